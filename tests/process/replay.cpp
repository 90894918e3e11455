// Runs recorded calls of an emulated library (tests/cuda_calls.py), without Python, so that any sanitizer may watch:
//   replay LIBRARY RECORD [together]
// Prints the status, what the library says of it, and a checksum of all memory afterwards but for what has addresses.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include <dlfcn.h>

namespace {

struct Call {
    void* function;
    void* args;
};

struct Link {
    int64_t storage, offset, target, target_offset;
};

struct Place {
    int64_t at, target, target_offset;
};

template <typename T>
T take(FILE* file) {
    T value;
    if (std::fread(&value, sizeof value, 1, file) != 1) std::exit(3);
    return value;
}

// Each in an allocation of its own size: what lies behind it belongs to nobody.
std::vector<unsigned char*> storages;
std::vector<int64_t> sizes;

void take_bytes(FILE* file, void* to, int64_t count) {
    if (count && std::fread(to, size_t(count), 1, file) != 1) std::exit(3);
}

void point(unsigned char* at, int64_t target, int64_t offset) {
    unsigned char* pointer = storages[size_t(target)] + offset;
    std::memcpy(at, &pointer, sizeof pointer);
}

}  // namespace

int main(int count, char** arguments) {
    if (count < 3) return 2;
    void* library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
    FILE* file = std::fopen(arguments[2], "rb");
    if (!library || !file) {
        std::fprintf(stderr, "%s\n", library ? "no record" : dlerror());
        return 2;
    }
    sizes.resize(size_t(take<int64_t>(file)));
    for (int64_t& size : sizes) size = take<int64_t>(file);
    for (int64_t size : sizes) {
        storages.push_back(static_cast<unsigned char*>(std::malloc(size_t(size))));
        take_bytes(file, storages.back(), size);
    }
    std::vector<bool> has_links(sizes.size());
    for (int64_t links = take<int64_t>(file); links > 0; links--) {
        const auto link = take<Link>(file);
        has_links[size_t(link.storage)] = true;
        point(storages[size_t(link.storage)] + link.offset, link.target, link.target_offset);
    }
    std::vector<Call> calls;
    for (int64_t left = take<int64_t>(file); left > 0; left--) {
        char name[33] = {}, symbol[48];
        take_bytes(file, name, 32);
        const auto bytes = take<int64_t>(file), places = take<int64_t>(file);
        auto* args = static_cast<unsigned char*>(std::malloc(size_t(bytes)));
        take_bytes(file, args, bytes);
        for (int64_t i = 0; i < places; i++) {
            const auto place = take<Place>(file);
            point(args + place.at, place.target, place.target_offset);
        }
        std::snprintf(symbol, sizeof symbol, "shoal_%s", name);
        calls.push_back({dlsym(library, symbol), args});
    }
    using Run = int (*)(const Call*, int64_t);
    const char* how = count > 3 ? "shoal_run_together" : "shoal_run";
    const int status = reinterpret_cast<Run>(dlsym(library, how))(calls.data(), int64_t(calls.size()));
    const char* error = reinterpret_cast<const char* (*)()>(dlsym(library, "shoal_error"))();
    uint64_t sum = 14695981039346656037u;
    for (size_t i = 0; i < storages.size(); i++)
        for (int64_t at = 0; at < sizes[i] && !has_links[i]; at++) sum = (sum ^ storages[i][at]) * 1099511628211u;
    std::printf("status %d %s\nchecksum %016llx\n", status, error, static_cast<unsigned long long>(sum));
    return 0;
}
