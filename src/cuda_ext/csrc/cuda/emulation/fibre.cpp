#include "fibre.h"

#include <cstdint>
#include <cstdlib>

#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

// SHOAL_UCONTEXT: the way of other processors also here.
#if defined(__x86_64__) && !defined(SHOAL_UCONTEXT)
#define SHOAL_OWN_STACKS
// Saves what a called function must keep, changes stacks, and returns on the other one.
extern "C" void shoal_change_stack(void** from, void* to);
asm(R"(
.text
.type shoal_change_stack, @function
shoal_change_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size shoal_change_stack, . - shoal_change_stack
)");
#else
#include <ucontext.h>
#endif

namespace emulation {

namespace {
#if defined(__SANITIZE_ADDRESS__) || defined(SHOAL_THREAD_SANITIZER)
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif
constexpr size_t kPage = 4096;
}  // namespace

void make_stack(Stack& stack) {
    // The lowest page stays closed: a stack that is too deep ends in a fault.
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) std::abort();
    stack.bottom = memory;
    stack.bytes = kStackBytes;
#if defined(SHOAL_THREAD_SANITIZER)
    stack.announced = __tsan_create_fiber(0);
#endif
}

// Of a fibre that was left for good.
static void forget_frames(const Stack& stack) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack.bottom, stack.bytes);
#endif
    (void)stack;
}

#if defined(SHOAL_OWN_STACKS)

void rewind(Stack& stack, void (*entry)()) {
    forget_frames(stack);
    auto* top = reinterpret_cast<uint64_t*>(const_cast<char*>(static_cast<const char*>(stack.bottom)) + stack.bytes);
    *--top = 0;  // no caller; the stack is aligned as after a call
    *--top = reinterpret_cast<uint64_t>(entry);
    for (int kept = 0; kept < 6; kept++) *--top = 0;
    stack.pointer = top;
    stack.fake = nullptr;
}

static void change_stack(Stack& from, Stack& to) { shoal_change_stack(&from.pointer, to.pointer); }

#else

void rewind(Stack& stack, void (*entry)()) {
    forget_frames(stack);
    if (!stack.pointer) stack.pointer = new ucontext_t;
    auto* context = static_cast<ucontext_t*>(stack.pointer);
    getcontext(context);
    context->uc_stack.ss_sp = const_cast<void*>(stack.bottom);
    context->uc_stack.ss_size = stack.bytes;
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
    stack.fake = nullptr;
}

static void change_stack(Stack& from, Stack& to) {
    if (!from.pointer) from.pointer = new ucontext_t;
    swapcontext(static_cast<ucontext_t*>(from.pointer), static_cast<ucontext_t*>(to.pointer));
}

#endif

#if defined(__SANITIZE_ADDRESS__)
static Stack* left;  // by the last change
#endif

void arrived(Stack& mine) {
#if defined(__SANITIZE_ADDRESS__)
    // The first stack's place is known once it has been left.
    __sanitizer_finish_switch_fiber(mine.fake, &left->bottom, &left->bytes);
#endif
    (void)mine;
}

void change(Stack& from, Stack& to, bool leaves) {
#if defined(__SANITIZE_ADDRESS__)
    left = &from;
    __sanitizer_start_switch_fiber(leaves ? nullptr : &from.fake, to.bottom, to.bytes);
#endif
#if defined(SHOAL_THREAD_SANITIZER)
    if (!from.announced) from.announced = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(to.announced, 1);  // 1: it orders nothing
#endif
    (void)leaves;
    change_stack(from, to);
    arrived(from);
}

}  // namespace emulation
