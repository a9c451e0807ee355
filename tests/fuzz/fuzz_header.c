/* fuzz_header.c - for targets whose input is a safetensors file: mutants of the header, whose
 * length is made right again. Nearly no other mutant would get past it. */
#include "fuzz.h"

#include <string.h>

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed);

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed) {
    uint64_t length = 0;
    if (size >= sizeof length)
        memcpy(&length, data, sizeof length);
    if (seed % 8 == 0 || size < sizeof length || length > size - sizeof length)
        return LLVMFuzzerMutate(data, size, max_size);
    const size_t behind = size - sizeof length - (size_t)length;
    const size_t room = max_size - behind - sizeof length;
    uint8_t *header = malloc(room + 1), *rest = malloc(behind + 1);
    FUZZ_CHECK(header && rest);
    memcpy(header, data + sizeof length, (size_t)length);
    memcpy(rest, data + size - behind, behind);
    length = LLVMFuzzerMutate(header, (size_t)length, room);
    memcpy(data, &length, sizeof length);
    memcpy(data + sizeof length, header, (size_t)length);
    memcpy(data + sizeof length + length, rest, behind);
    free(header);
    free(rest);
    return sizeof length + (size_t)length + behind;
}
