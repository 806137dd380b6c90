// Stands in for libcuda: the functions of CUDA's driver that mctune's launcher calls. A module of machine code is looked
// up by its hash among libraries of the same kernels for the CPU, in the folders that MCTUNE_CUDA_ON_CPU names.
#include "device.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>

extern "C" int mctune_launch(const device::Entry*, const int*, int, unsigned, void**, unsigned, char*, int);

namespace {

enum { kOk = 0, kInvalid = 1, kDamaged = 200, kNotFound = 500, kFailed = 719 };

// CUlaunchConfig.
struct LaunchConfig {
    unsigned grid[3], block[3], shared_bytes;
    void *stream, *attributes;
    unsigned attribute_count;
};

struct Module {
    const device::Entry* entries;
};

struct Function {
    const device::Entry* entry;
    unsigned most_shared = 48 << 10;
};

std::mutex guard;
unsigned launches;
thread_local std::string last_error;

template <typename T>
T number(const unsigned char* image, int at) {
    T value;
    std::memcpy(&value, image + at, sizeof value);
    return value;
}

// An ELF file says how long it is.
size_t size_of(const unsigned char* image) {
    size_t sections = number<uint64_t>(image, 0x28) + size_t{number<uint16_t>(image, 0x3a)} * number<uint16_t>(image, 0x3c);
    size_t segments = number<uint64_t>(image, 0x20) + size_t{number<uint16_t>(image, 0x36)} * number<uint16_t>(image, 0x38);
    return sections > segments ? sections : segments;
}

int failed(int status, const std::string& why) {
    last_error = why;
    return status;
}

}  // namespace

extern "C" {

// Kernels' libraries take the shim from this one.
int cuInit(unsigned) {
    Dl_info self;
    if (dladdr(reinterpret_cast<void*>(&cuInit), &self) == 0) return failed(kFailed, "it does not find itself");
    return dlopen(self.dli_fname, RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD) ? kOk : failed(kFailed, dlerror());
}

int cuGetErrorString(int, const char** text) {
    *text = last_error.c_str();
    return kOk;
}

int cuModuleLoadData(void** module, const void* data) {
    auto* image = static_cast<const unsigned char*>(data);
    if (std::memcmp(image, "\x7f" "ELF", 4) != 0) return failed(kDamaged, "it is no machine code");
    uint64_t hash = 14695981039346656037ull;
    for (size_t i = 0; i < size_of(image); ++i) hash = (hash ^ image[i]) * 1099511628211ull;
    char name[32];
    std::snprintf(name, sizeof name, "/%016llx.so", static_cast<unsigned long long>(hash));
    const char* folders = std::getenv("MCTUNE_CUDA_ON_CPU");
    std::string left = folders ? folders : "";
    while (!left.empty()) {
        size_t colon = left.find(':');
        std::string path = left.substr(0, colon) + name;
        left = colon == std::string::npos ? "" : left.substr(colon + 1);
        if (FILE* file = std::fopen(path.c_str(), "rb")) {
            std::fclose(file);
            void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
            if (library == nullptr) return failed(kDamaged, dlerror());
            *module = new Module{static_cast<const device::Entry*>(dlsym(library, "mctune_entries"))};
            return kOk;
        }
    }
    return failed(kNotFound, std::string("there is no library of its kernels for the CPU:") + name);
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
    for (auto* entry = static_cast<Module*>(module)->entries; entry->name != nullptr; ++entry) {
        if (std::strcmp(entry->name, name) == 0) {
            *function = new Function{entry};
            return kOk;
        }
    }
    return kNotFound;
}

int cuFuncSetAttribute(void* function, int attribute, int value) {
    if (attribute != 8 || value < 0) return kInvalid;
    static_cast<Function*>(function)->most_shared = static_cast<unsigned>(value);
    return kOk;
}

int cuLaunchKernelEx(const LaunchConfig* config, void* function, void** arguments, void**) {
    auto* kernel = static_cast<Function*>(function);
    unsigned x = config->grid[0], y = config->grid[1], z = config->grid[2];
    unsigned shared_bytes = config->shared_bytes;
    if (config->attribute_count != 0) return failed(kInvalid, "attributes of a launch are unknown here");
    if (x == 0 || y == 0 || z == 0 || y > 65535 || z > 65535) return failed(kInvalid, "a side of the grid is out of bounds");
    if (shared_bytes > kernel->most_shared) return failed(kInvalid, "more shared memory than was asked for before");
    int grid[] = {static_cast<int>(x), static_cast<int>(y), static_cast<int>(z)};
    char said[1024];
    unsigned seed;
    {
        std::lock_guard<std::mutex> lock(guard);
        seed = ++launches;
    }
    if (mctune_launch(kernel->entry, grid, static_cast<int>(config->block[0]), shared_bytes, arguments, seed, said, sizeof said))
        return failed(kFailed, said);
    return kOk;
}
}
