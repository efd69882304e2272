// A libcuda that launches the package's CUDA kernels on the CPU (simt.h), for tensors in ordinary memory.
//
// It exports what the launcher calls, with the driver's signatures, and simt_* for the tests.
// Compiled with -DSOURCE='"path of the source"'.
#include <dlfcn.h>

#include <map>
#include <string>
#include <utility>

#include "simt.h"

#include SOURCE

struct Words load_once(const void* address) {
    Words v{};
    if (simt::can_access(address, 16)) memcpy(&v, address, 16);
    return v;
}

Words load_cached(const void* address, bool is_wanted) { return is_wanted ? load_once(address) : Words{}; }

uint16_t load_half(const uint16_t* address) { return simt::can_access(address, 2) ? *address : 0; }

static char* shared(int rank, uint32_t offset, uint32_t bytes) {
    auto& memory = simt::blocks[rank].memory;
    static float nowhere[4];
    if (offset % bytes == 0 && offset + bytes <= memory.size() * 4) return (char*)memory.data() + offset;
    simt::problem = "shared memory that the block does not have";
    return (char*)nowhere;
}

static bool is_late;  // copies are made when they are waited for, not when they are asked for

static void copy_now(uint32_t offset, const void* address) {
    const Words v = load_once(address);
    memcpy(shared(cluster_rank(), offset, 16), &v, 16);
}

void copy_to_shared(uint32_t offset, const void* address) {
    if (!is_late) return copy_now(offset, address);
    auto& copies = simt::current->copies;
    if (copies.empty()) copies.emplace_back();
    copies.back().push_back({offset, address});
}

void end_copies() { simt::current->copies.emplace_back(); }

template <int LEFT> void wait_for_copies() {
    auto& copies = simt::current->copies;
    for (int i = 0; i + LEFT + 1 < (int)copies.size(); i++) {  // the last group is still open
        for (auto& copy : copies[i]) copy_now(copy.first, copy.second);
        copies[i].clear();
    }
}

Words load_shared_of(uint32_t offset, uint32_t rank) {
    Words v;
    memcpy(&v, shared(rank, offset, 16), 16);
    return v;
}

Words load_shared(uint32_t offset) { return load_shared_of(offset, cluster_rank()); }
void load_shared_pair(uint32_t offset, uint32_t* word) { memcpy(word, shared(cluster_rank(), offset, 8), 8); }

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

template <typename T> struct Caller;
template <typename... A> struct Caller<void(A...)> {
    template <size_t... I> static void call(void* kernel, void** a, std::index_sequence<I...>) {
        ((void (*)(A...))kernel)(get<A>(a, I)...);
    }
    static void run(void* kernel, void** a) { call(kernel, a, std::index_sequence_for<A...>()); }
};

// The kernels by the first word of their names; each is a symbol of this library.
struct Kind { const char* name; void (*run)(void*, void**); };
static const Kind kinds[] = {
    {"multiply", Caller<decltype(multiply_int4_float16)>::run},
    {"tiles", Caller<decltype(tiles_int4_float16_2x8)>::run},
    {"dequantize", Caller<decltype(dequantize_int4_float16)>::run},
};
struct Function { std::string name; void* kernel; const Kind* kind; size_t most_memory; };
static std::map<std::string, Function> functions;

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
    void* kernel = dlsym(RTLD_DEFAULT, name);
    Dl_info here, there;
    dladdr((void*)&cuModuleGetFunction, &here);
    if (!kernel) {  // this library is not among those that all see
        void* self = dlopen(here.dli_fname, RTLD_NOW | RTLD_NOLOAD);
        kernel = dlsym(self, name);
        dlclose(self);
    }
    if (!kernel || !dladdr(kernel, &there) || strcmp(here.dli_fname, there.dli_fname)) return NOT_FOUND;
    for (auto& kind : kinds)
        if (!strncmp(name, kind.name, strlen(kind.name))) {
            *function = &functions.insert({name, {name, kernel, &kind, 48 * 1024}}).first->second;
            return SUCCESS;
        }
    return NOT_FOUND;
}

int cuFuncSetAttribute(void* function, int attribute, int value) {
    if (attribute != 8 || value > 227 * 1024) return INVALID_VALUE;  // the most shared memory of a block
    ((Function*)function)->most_memory = value;
    return SUCCESS;
}

static int start(void* function, simt::Dim grid, simt::Dim block, unsigned shared_bytes, int cluster, void* stream,
                 void** arguments, void** extra) {
    if (is_to_fail("cuLaunchKernel")) return fails_with;
    if (!has_context) return INVALID_CONTEXT;
    if (!grid.x || !grid.y || grid.z != 1 || !block.x || block.y != 1 || block.z != 1 || extra) return INVALID_VALUE;
    launches++;
    last_stream = stream;
    const auto& known = *(Function*)function;
    return simt::launch(grid, block.x, shared_bytes, known.most_memory, cluster,
                        [&] { known.kind->run(known.kernel, arguments); }) ? SUCCESS : ILLEGAL_ADDRESS;
}

int cuLaunchKernel(void* function, int gx, int gy, int gz, int bx, int by, int bz, unsigned shared_bytes, void* stream,
                   void** arguments, void** extra) {
    return start(function, {gx, gy, gz}, {bx, by, bz}, shared_bytes, 1, stream, arguments, extra);
}

struct Attribute { int id; int padding; int value[16]; };
struct Configuration {
    simt::Dim grid, block;
    unsigned shared_bytes;
    void* stream;
    Attribute* attributes;
    unsigned count;
};

int cuLaunchKernelEx(const Configuration* how, void* function, void** arguments, void** extra) {
    int cluster = 1;
    for (unsigned i = 0; i < how->count; i++) {
        const Attribute& each = how->attributes[i];
        if (each.id != 4 || each.value[1] != 1 || each.value[2] != 1) return INVALID_VALUE;  // the cluster's dimensions
        cluster = each.value[0];
    }
    return start(function, how->grid, how->block, how->shared_bytes, cluster, how->stream, arguments, extra);
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

void simt_delay_copies(bool wanted) { is_late = wanted; }
void simt_lose_context() { has_context = false; }
int simt_launches() { return launches; }
void* simt_last_stream() { return last_stream; }
char simt_image_kind() { return image_kind; }
}
