#include "memory.h"

#include <algorithm>
#include <mutex>
#include <thread>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

// Of torch's stable interface since 2.11; null in 2.10, where gradients are torch's own memory.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset,
    int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* result,
    int32_t layout, const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
    void (*deleter)(void* data, void* context), void* context);

namespace {

// From this size on, the pages of fresh memory cost more than what is written there.
constexpr int64_t kLarge = 4 << 20;
constexpr int64_t kPage = 2 << 20;  // a large one

int32_t number_of(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

int64_t bytes_of(const Tensor& t) { return t.numel() * int64_t(t.element_size()); }

#if defined(__linux__) && defined(MADV_FREE)
constexpr size_t kMostFreed = 8;  // buffers that wait to be taken again; the oldest goes first

// Pages of ours: `size` bytes from a large page's beginning on.
struct Buffer {
  void* mapped = nullptr;
  char* data = nullptr;
  int64_t size = 0;
  std::thread::id owner;  // the thread that took it last

  void unmap() const { munmap(mapped, size + kPage); }
};

// A size that similar ones share: at most an eighth more than is asked for, in large pages.
int64_t size_class(int64_t bytes) {
  int64_t step = kPage;
  while (step * 16 <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

// Freed buffers, the oldest first: one for each thread and size. Nobody waits for the lock, for a
// forked process may find it held by a thread that it does not have: then pages are fresh.
class Freed {
 public:
  Buffer take(int64_t size) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    const auto found = lock ? find(std::this_thread::get_id(), size) : buffers_.end();
    if (!lock || found == buffers_.end()) return {};
    const Buffer buffer = *found;
    buffers_.erase(found);
    return buffer;
  }
  void put(const Buffer& buffer) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    const bool full = !lock || find(buffer.owner, buffer.size) != buffers_.end();
    if (full || madvise(buffer.data, buffer.size, MADV_FREE) != 0) return buffer.unmap();
    if (buffers_.size() == kMostFreed) {
      buffers_.front().unmap();
      buffers_.erase(buffers_.begin());
    }
    buffers_.push_back(buffer);
  }
  int64_t clear() {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return 0;
    int64_t bytes = 0;
    for (const Buffer& buffer : buffers_) buffer.unmap(), bytes += buffer.size;
    buffers_.clear();
    return bytes;
  }

 private:
  std::vector<Buffer>::iterator find(std::thread::id owner, int64_t size) {
    return std::find_if(buffers_.begin(), buffers_.end(), [&](const Buffer& buffer) {
      return buffer.owner == owner && buffer.size == size;
    });
  }
  std::mutex mutex_;
  std::vector<Buffer> buffers_;
};

Freed& freed() {
  static Freed& all = *new Freed;  // never destroyed: tensors may outlive what is static
  return all;
}

Buffer map(int64_t size) {
  void* mapped =
      mmap(nullptr, size + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return {};
  const uintptr_t data = (reinterpret_cast<uintptr_t>(mapped) + kPage - 1) / kPage * kPage;
  Buffer buffer{mapped, reinterpret_cast<char*>(data), size, {}};
  madvise(buffer.data, size, MADV_HUGEPAGE);
  return buffer;
}

// A tensor in pages of ours; nothing where there are none to be had.
MaybeTensor in_own_pages(const int64_t* sizes, const int64_t* strides, int64_t rank, int64_t bytes,
                         ScalarType dtype) {
  if (!torch_from_blob || bytes < kLarge) return {};
  const int64_t size = size_class(bytes);
  Buffer buffer = freed().take(size);
  if (!buffer.data) buffer = map(size);
  if (!buffer.data && freed().clear()) buffer = map(size);  // where address space is limited
  if (!buffer.data) return {};
  buffer.owner = std::this_thread::get_id();
  const auto release = [](void*, void* context) {
    const Buffer* own = static_cast<Buffer*>(context);
    freed().put(*own);
    delete own;
  };
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_from_blob(
      buffer.data, rank, sizes, strides, 0, number_of(dtype), aoti_torch_device_type_cpu(), -1,
      &handle, aoti_torch_layout_strided(), nullptr, 0, release, new Buffer(buffer)));
  return Tensor(handle);
}
#else
MaybeTensor in_own_pages(const int64_t*, const int64_t*, int64_t, int64_t, ScalarType) {
  return {};
}
#endif

// Whether elements lie one after the other in some order of the axes, each in a place of its own.
bool is_dense(const Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> axes;
  for (int64_t i = 0; i < t.dim(); ++i)
    if (t.size(i) > 1) axes.emplace_back(t.stride(i), t.size(i));
  std::sort(axes.begin(), axes.end());
  int64_t extent = 1;
  for (const auto& [stride, size] : axes) {
    if (stride != extent) return false;
    extent *= size;
  }
  return true;
}

void advise_huge_pages(const Tensor& t) {
#ifdef __linux__
  if (bytes_of(t) < kLarge) return;
  const uintptr_t data = reinterpret_cast<uintptr_t>(t.data_ptr());
  const uintptr_t begin = (data + kPage - 1) / kPage * kPage;
  const uintptr_t end = (data + bytes_of(t)) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

int64_t item_size(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

// By the C interface, which asks no dispatcher for an operator by its name: small calls notice.
Tensor torchs_own(const int64_t* sizes, const int64_t* strides, int64_t rank, ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      rank, sizes, strides, number_of(dtype), aoti_torch_device_type_cpu(), -1, &handle));
  return Tensor(handle);
}

std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;)
    strides[i - 1] = strides[i] * std::max<int64_t>(1, shape[i]);
  return strides;
}

Tensor large_memory(const Tensor&, std::vector<int64_t> shape, ScalarType dtype, bool stays) {
  return stays ? fresh(shape, dtype) : passing(shape, dtype);
}

}  // namespace

Tensor fresh(const std::vector<int64_t>& shape, ScalarType dtype) {
  const std::vector<int64_t> strides = contiguous_strides(shape);
  const Tensor t = torchs_own(shape.data(), strides.data(), int64_t(shape.size()), dtype);
  advise_huge_pages(t);
  return t;
}

Tensor passing(const std::vector<int64_t>& shape, ScalarType dtype) {
  const std::vector<int64_t> strides = contiguous_strides(shape);
  const int64_t count = shape.empty() ? 1 : shape[0] * strides[0];
  const auto own = in_own_pages(shape.data(), strides.data(), int64_t(shape.size()),
                                count * item_size(dtype), dtype);
  return own ? *own : fresh(shape, dtype);
}

Tensor gradient_like(const Tensor& like) {
  if (!is_dense(like)) {
    const Tensor t = torch::stable::empty_like(like);
    advise_huge_pages(t);
    return t;
  }
  const int64_t *sizes = like.sizes().data(), *strides = like.strides().data();
  const auto own = in_own_pages(sizes, strides, like.dim(), bytes_of(like), like.scalar_type());
  if (own) return *own;
  const Tensor t = torchs_own(sizes, strides, like.dim(), like.scalar_type());
  advise_huge_pages(t);
  return t;
}

int64_t empty_cache() {
#if defined(__linux__) && defined(MADV_FREE)
  return freed().clear();
#else
  return 0;
#endif
}

STABLE_TORCH_LIBRARY_IMPL(crossent, CPU, m) { m.impl("large_memory", TORCH_BOX(&large_memory)); }
STABLE_TORCH_LIBRARY_IMPL(crossent, CompositeExplicitAutograd, m) {
  m.impl("empty_cache", TORCH_BOX(&empty_cache));
}
