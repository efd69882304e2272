/* Run the functions that are linked in, one after the other, on memory that is read and written at one address.

   Standard input is the whole memory, from BASE on, in which the functions' tasks are; standard output is the same
   memory afterwards. The sizes and the tasks' places are given by -D when this is built. */
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

void first(void *task);
void second(void *task);

int main(void) {
    char *memory = mmap((void *)BASE, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    if (memory != (char *)BASE) return 1;
    for (int64_t done = 0, count; done < SIZE; done += count)
        if ((count = read(0, memory + done, SIZE - done)) <= 0) return 2;
    first(memory + FIRST_TASK);
    second(memory + SECOND_TASK);
    for (int64_t done = 0, count; done < SIZE; done += count)
        if ((count = write(1, memory + done, SIZE - done)) <= 0) return 3;
    return 0;
}
