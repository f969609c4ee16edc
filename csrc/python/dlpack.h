#pragma once
// The part of DLPack's C interface by which a library shows its tensors to another one: the structs
// and function types of version 1 (dmlc/dlpack, include/dlpack/dlpack.h), which stay as they are
// through all of its minor versions. torch offers it from 2.11 on.

#include <cstdint>

namespace kfac_fast::dlpack {

constexpr uint32_t major_version = 1;
constexpr int32_t cpu = 1;
enum Code : uint8_t { code_int = 0, code_float = 2, code_bfloat = 4, code_bool = 6 };

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

// Valid as long as the tensor that it is of.
struct Tensor {
  void* data;
  int32_t device, device_index, dims;
  DataType type;
  int64_t* sizes;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  const ExchangeApi* older;
  void* allocate;
  void* to_managed;
  void* from_managed;
  int (*view)(void* object, Tensor* view);  // 0, or -1 with a Python exception set
  void* current_stream;
};

}  // namespace kfac_fast::dlpack
