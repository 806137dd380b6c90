// Launches what a file has recorded, in a program of its own: sanitizers need the whole of one.
//
// The file: for each launch the kernel's name, the grid, threads, bytes of shared memory, and the arguments, a size in
// bytes and their content each; a size of -1 is a number of four bytes.
#include "device.h"

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

extern "C" int mctune_launch(const device::Entry*, const int*, int, unsigned, void**, unsigned, char*, int);
extern "C" const device::Entry mctune_entries[];

namespace {

template <typename T>
bool read(FILE* file, T* values, size_t count = 1) {
    return std::fread(values, sizeof(T), count, file) == count;
}

}  // namespace

int main(int count, char** words) {
    if (count != 3) return 2;
    FILE* file = std::fopen(words[1], "rb");
    if (file == nullptr) return 2;
    unsigned seed = static_cast<unsigned>(std::atoi(words[2]));
    int32_t length;
    while (read(file, &length)) {
        std::string name(static_cast<size_t>(length), 0);
        int32_t launch[5], arguments;
        if (!read(file, name.data(), name.size()) || !read(file, launch, 5) || !read(file, &arguments)) return 2;
        std::vector<void*> values(static_cast<size_t>(arguments)), places(values.size());
        std::vector<bool> pointer(values.size());
        for (size_t i = 0; i < values.size(); ++i) {
            int64_t bytes;
            if (!read(file, &bytes)) return 2;
            pointer[i] = bytes >= 0;
            size_t size = bytes < 0 ? 4 : static_cast<size_t>(bytes);
            // Each has memory of its own size: what is beside it is nobody's.
            if (posix_memalign(&values[i], 64, size ? size : 1) != 0) return 2;
            if (!read(file, static_cast<char*>(values[i]), size)) return 2;
            places[i] = pointer[i] ? static_cast<void*>(&values[i]) : values[i];
        }
        const device::Entry* entry = mctune_entries;
        while (entry->name != nullptr && name != entry->name) ++entry;
        if (entry->name == nullptr) return 2;
        char said[1024] = "";
        if (mctune_launch(entry, launch, launch[3], static_cast<unsigned>(launch[4]), places.data(), ++seed, said, sizeof said)) {
            std::fprintf(stderr, "FAILED %s\n", said);
            return 3;
        }
        for (void* value : values) std::free(value);
    }
    std::fclose(file);
    return 0;
}
