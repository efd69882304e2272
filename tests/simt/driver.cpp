// A libcuda that launches visualglm_hf/cuda_source.py's source on the CPU (simt.h), for tensors in ordinary memory.
//
// It exports what the launcher calls, with the driver's signatures, and simt_* for the tests.
// Compiled with -DSOURCE='"path of the source"'.
#include "simt.h"

#include SOURCE

struct Words load_once(const void* address) {
    Words v{};
    if (simt::can_access(address, 16)) memcpy(&v, address, 16);
    return v;
}

Words load_cached(const void* address, bool is_wanted) { return is_wanted ? load_once(address) : Words{}; }

uint16_t load_half(const uint16_t* address) { return simt::can_access(address, 2) ? *address : 0; }

void store(void* address, Words v) {
    if (simt::can_access(address, 16)) memcpy(address, &v, 16);
}

enum { SUCCESS = 0, INVALID_VALUE = 1, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, NOT_FOUND = 500, ILLEGAL_ADDRESS = 700 };
static char image_kind;        // of the module: 'E' for ELF, 'P' for PTX
static const char* fails;      // a function of the driver that is to fail
static int fails_with, launches;
static void* last_stream;
static bool has_context = true;  // this thread

template <typename T> static T get(void** arguments, int i) { return *(T*)arguments[i]; }

template <void (*KERNEL)(const u16*, const signed char*, const u16*, u16*, int, int, int, int, int)>
static void run_multiply(void** a) {
    KERNEL(get<u16*>(a, 0), get<signed char*>(a, 1), get<u16*>(a, 2), get<u16*>(a, 3), get<int>(a, 4), get<int>(a, 5),
           get<int>(a, 6), get<int>(a, 7), get<int>(a, 8));
}

template <void (*KERNEL)(const signed char*, const u16*, u16*, int, int, int, int)>
static void run_dequantize(void** a) {
    KERNEL(get<signed char*>(a, 0), get<u16*>(a, 1), get<u16*>(a, 2), get<int>(a, 3), get<int>(a, 4), get<int>(a, 5),
           get<int>(a, 6));
}

struct Function { const char* name; void (*run)(void**); };
static const Function functions[] = {
    {"multiply_int4_float16", run_multiply<multiply_int4_float16>},
    {"multiply_int8_float16", run_multiply<multiply_int8_float16>},
    {"multiply_int4_bfloat16", run_multiply<multiply_int4_bfloat16>},
    {"multiply_int8_bfloat16", run_multiply<multiply_int8_bfloat16>},
    {"dequantize_int4_float16", run_dequantize<dequantize_int4_float16>},
    {"dequantize_int8_float16", run_dequantize<dequantize_int8_float16>},
    {"dequantize_int4_bfloat16", run_dequantize<dequantize_int4_bfloat16>},
    {"dequantize_int8_bfloat16", run_dequantize<dequantize_int8_bfloat16>},
};

static bool is_to_fail(const char* function) { return fails && !strcmp(fails, function); }

extern "C" {
int cuCtxGetCurrent(void** context) {
    *context = &has_context;
    return SUCCESS;
}

int cuCtxSetCurrent(void* context) {
    has_context = context == &has_context;
    return has_context ? SUCCESS : INVALID_CONTEXT;
}

int cuModuleLoadData(void** module, const void* image) {
    if (is_to_fail("cuModuleLoadData")) return fails_with;
    if (!memcmp(image, "\x7f" "ELF", 4)) image_kind = 'E';
    else if (strstr((const char*)image, ".target")) image_kind = 'P';
    else return INVALID_IMAGE;
    *module = &image_kind;
    return SUCCESS;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
    if (is_to_fail("cuModuleGetFunction")) return fails_with;
    if (module != &image_kind) return INVALID_VALUE;
    for (auto& known : functions)
        if (!strcmp(known.name, name)) {
            *function = (void*)&known;
            return SUCCESS;
        }
    return NOT_FOUND;
}

int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared_bytes, void* stream, void** arguments, void** extra) {
    if (is_to_fail("cuLaunchKernel")) return fails_with;
    if (!has_context) return INVALID_CONTEXT;
    if (!gx || !gy || gz != 1 || !bx || by != 1 || bz != 1 || extra) return INVALID_VALUE;
    launches++;
    last_stream = stream;
    auto run = ((const Function*)function)->run;
    return simt::launch({(int)gx, (int)gy, 1}, bx, shared_bytes, [=] { run(arguments); }) ? SUCCESS : ILLEGAL_ADDRESS;
}

int cuGetErrorString(int code, const char** text) {
    *text = simt::problem ? simt::problem : code == NOT_FOUND ? "named symbol not found" : "pretended failure";
    return SUCCESS;
}

void simt_fail(const char* function, int code) {
    static char name[64];
    fails = function ? strncpy(name, function, 63) : nullptr;
    fails_with = code;
}

void simt_allow(const void* start, size_t bytes) {
    if (start) simt::allowed.push_back({(uintptr_t)start, bytes});
    else simt::allowed.clear();
}

void simt_lose_context() { has_context = false; }
int simt_launches() { return launches; }
void* simt_last_stream() { return last_stream; }
char simt_image_kind() { return image_kind; }
}
