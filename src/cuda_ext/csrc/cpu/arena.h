// Memory that a launcher keeps between calls: it only grows. Launchers are called from one thread.
#pragma once

#include <cstdint>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
constexpr int64_t kFence = 64;  // bytes behind each array, which the sanitizer watches
#else
constexpr int64_t kFence = 0;
#define ASAN_POISON_MEMORY_REGION(start, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(start, bytes)
#endif

class Arena {
  public:
    // At least ``bytes``, aligned to a cache line; null where there is no memory. What was there is lost.
    char* reserve(int64_t bytes) {
        if (bytes > size_) {
            std::free(start_);
            start_ = static_cast<char*>(std::aligned_alloc(kLine, padded(bytes)));
            size_ = start_ ? padded(bytes) : 0;
        }
        return start_;
    }
    ~Arena() { std::free(start_); }

    static int64_t padded(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

  private:
    static constexpr int64_t kLine = 64;
    char* start_ = nullptr;
    int64_t size_ = 0;
};

// Cuts arrays from a piece of memory; with a null piece it only counts the bytes.
class Carver {
  public:
    explicit Carver(char* at) : start_(at), at_(0) {}
    template <typename T>
    T* take(int64_t count) {
        const int64_t bytes = count * int64_t(sizeof(T)), room = Arena::padded(bytes + kFence);
        T* array = start_ ? reinterpret_cast<T*>(start_ + at_) : nullptr;
        if (array) {
            ASAN_UNPOISON_MEMORY_REGION(start_ + at_, bytes);
            ASAN_POISON_MEMORY_REGION(start_ + at_ + bytes, room - bytes);
        }
        at_ += room;
        return array;
    }
    int64_t taken() const { return at_; }

  private:
    char* start_;
    int64_t at_;
};
