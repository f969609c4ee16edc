// Includes KFAC_FAST_BODY once for every instruction set, inside a namespace of its name, with
//   KFAC_FAST_TARGET        the attribute that allows the set's instructions in one function
//   KFAC_FAST_VECTOR_BYTES  the size of its vector registers
//
// The attribute must sit on the very function that does the vector arithmetic: the compiler breaks
// wide vectors into narrow ones when it compiles a function without it, and inlining that function
// into one that has the attribute afterwards does not put them together again. Lambdas do not
// inherit it either.

#define KFAC_FAST_TARGET
#define KFAC_FAST_VECTOR_BYTES 16
namespace portable {
#include KFAC_FAST_BODY
}
#undef KFAC_FAST_TARGET
#undef KFAC_FAST_VECTOR_BYTES

#if defined(__x86_64__)
#define KFAC_FAST_TARGET __attribute__((target("avx2,fma")))
#define KFAC_FAST_VECTOR_BYTES 32
namespace avx2 {
#include KFAC_FAST_BODY
}
#undef KFAC_FAST_TARGET
#undef KFAC_FAST_VECTOR_BYTES

#define KFAC_FAST_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define KFAC_FAST_VECTOR_BYTES 64
namespace avx512 {
#include KFAC_FAST_BODY
}
#undef KFAC_FAST_TARGET
#undef KFAC_FAST_VECTOR_BYTES
#endif

#undef KFAC_FAST_BODY
