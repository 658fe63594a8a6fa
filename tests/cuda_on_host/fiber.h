// A stack of its own for what runs, and a way to leave it when it touches memory that is nobody's.
//
// ucontext makes a stack; _setjmp and _longjmp go from one to another without a system call.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdlib>
#include <new>

namespace fastqat::cuda_on_host {

constexpr size_t kStack = 128 * 1024, kPage = 4096;

// A stack on which threads run, one after the other.
struct Fiber {
  char* stack;
  ucontext_t start;
  jmp_buf here;
  bool begun = false;

  // The page below a stack cannot be touched. Their tops lie in different lines of a cache.
  Fiber(void (*body)(), size_t number) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE)) throw std::bad_alloc();
    stack = static_cast<char*>(memory);
    getcontext(&start);
    start.uc_stack.ss_sp = stack;
    start.uc_stack.ss_size = kStack - number % 61 * 192;
    start.uc_link = nullptr;
    makecontext(&start, body, 0);
  }
  Fiber(const Fiber&) = delete;
  ~Fiber() { munmap(stack, kStack); }

  [[noreturn]] void go_on() {
    if (begun) _longjmp(here, 1);
    begun = true;
    setcontext(&start);
    std::abort();
  }
};

// While it lives, an access to memory that cannot be accessed calls a function, which does not return.
struct Faults {
  struct sigaction before;

  explicit Faults(void (*on_fault)(int)) {
    struct sigaction action{};
    action.sa_handler = on_fault;
    action.sa_flags = SA_NODEFER;  // it stays unblocked, since nobody returns from it
    sigaction(SIGSEGV, &action, &before);
  }
  Faults(const Faults&) = delete;
  ~Faults() { sigaction(SIGSEGV, &before, nullptr); }
};

}  // namespace fastqat::cuda_on_host
