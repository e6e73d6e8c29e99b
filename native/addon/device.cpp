#include "device.hpp"

#include <algorithm>
#include <cstring>

namespace fewbit {

namespace {
constexpr size_t kStaging = size_t{32} << 20;
/** Copies to the device go in parts of this size, so that filling one part overlaps with copying another. */
constexpr size_t kPart = kStaging / 4;
/** Larger blocks of pinned memory are given back after a read, not kept. */
constexpr size_t kKeep = size_t{64} << 20;
constexpr size_t kWorkspace = size_t{32} << 20;
/** The pool keeps this much freed memory, so that small programs come and go without asking the driver. */
constexpr uint64_t kPoolKeep = uint64_t{256} << 20;

size_t sizeClass(size_t bytes) {
  size_t size = 4096;
  while (size < bytes) size *= 2;
  return size;
}
}  // namespace

Device::Device(int index, Notify notify) : index_(index), notify_(std::move(notify)), ring_(kStaging) {
  check(cudaSetDevice(index_), "opening the device");
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, index_), "asking for the device's properties");
  context_.device = index_;
  context_.sms = properties.multiProcessorCount;
  context_.major = properties.major;
  context_.minor = properties.minor;
  context_.sharedPerBlock = properties.sharedMemPerBlockOptin;
  context_.overlaps = waitsForPredecessors();
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "creating a stream");
  if (properties.memoryPoolsSupported) {
    cudaMemPoolProps pool = {};
    pool.allocType = cudaMemAllocationTypePinned;
    pool.location.type = cudaMemLocationTypeDevice;
    pool.location.id = index_;
    check(cudaMemPoolCreate(&pool_, &pool), "creating a memory pool");
    uint64_t keep = kPoolKeep;
    check(cudaMemPoolSetAttribute(pool_, cudaMemPoolAttrReleaseThreshold, &keep), "setting up the memory pool");
  }
  context_.blas = loadCublasLt(&blasReason_);
  if (context_.blas) {
    check(cudaMalloc(&context_.workspace, kWorkspace), "allocating cuBLASLt's workspace");
    context_.workspaceBytes = kWorkspace;
  }
  waiter_ = std::thread([this] { waitLoop(); });
}

Device::~Device() { dispose(); }

void Device::enter() {
  if (disposed_) throw Failure(Failure::Kind::error, "using a device", "it was disposed");
  check(cudaSetDevice(index_), "selecting the device");
}

const Device::Buffer& Device::buffer(uint32_t id, uint64_t at, uint64_t bytes, const char* operation) const {
  const auto found = buffers_.find(id);
  if (found == buffers_.end()) throw Failure(Failure::Kind::error, operation, "buffer " + std::to_string(id) + " does not exist");
  if (at > found->second.bytes || bytes > found->second.bytes - at)
    throw Failure(Failure::Kind::error, operation, "the range lies outside the buffer");
  return found->second;
}

void* Device::raw(uint64_t bytes, const char* what) {
  void* pointer = nullptr;
  const cudaError_t status =
      pool_ ? cudaMallocFromPoolAsync(&pointer, bytes, pool_, stream_) : cudaMalloc(&pointer, bytes);
  if (status != cudaSuccess) {
    Failure error = failure(status, what);
    size_t free = 0, total = 0;
    if (error.kind == Failure::Kind::memory && cudaMemGetInfo(&free, &total) == cudaSuccess) {
      error.needed = bytes;
      error.limit = free;
    }
    throw error;
  }
  return pointer;
}

void Device::release(void* pointer) {
  // After a sticky error nothing can be freed any more: the process's context is gone, and its memory with it.
  if (pool_) cudaFreeAsync(pointer, stream_);
  else cudaFree(pointer);
  cudaGetLastError();
}

uint32_t Device::allocate(uint64_t bytes) {
  enter();
  const uint64_t size = std::max<uint64_t>(256, (bytes + 255) / 256 * 256);
  void* pointer = raw(size, "allocating a buffer");
  if (const cudaError_t status = cudaMemsetAsync(pointer, 0, size, stream_); status != cudaSuccess) {
    release(pointer);
    throw failure(status, "clearing a buffer");
  }
  const uint32_t id = nextBuffer_++;
  buffers_[id] = {pointer, size};
  bytes_ += size;
  return id;
}

void Device::free(uint32_t id) {
  if (disposed_) return;
  const auto found = buffers_.find(id);
  if (found == buffers_.end()) return;
  cudaSetDevice(index_);
  release(found->second.pointer);
  bytes_ -= found->second.bytes;
  buffers_.erase(found);
}

void Device::upload(void* to, const void* data, uint64_t bytes) {
  if (bytes == 0) return;
  if (bytes <= kFewBytes) {
    check(storeFew(to, data, bytes, stream_), "uploading");
    return;
  }
  if (staging_.pointer == nullptr) {
    check(cudaHostAlloc(&staging_.pointer, kStaging, cudaHostAllocDefault), "allocating pinned memory");
    staging_.bytes = kStaging;
    pinnedBytes_ += kStaging;
  }
  ring_.collect([this](cudaEvent_t done) {
    if (cudaEventQuery(done) != cudaSuccess) {
      cudaGetLastError();  // "not ready" would be taken for the error of the next launch
      return false;
    }
    idle_.push_back(done);
    return true;
  });
  const auto* from = static_cast<const uint8_t*>(data);
  for (uint64_t at = 0; at < bytes; at += kPart) {
    const size_t size = static_cast<size_t>(std::min<uint64_t>(kPart, bytes - at));
    const size_t place = ring_.reserve((size + 63) / 64 * 64, [this](cudaEvent_t done) {
      check(cudaEventSynchronize(done), "waiting for an upload");
      idle_.push_back(done);
    });
    uint8_t* stage = static_cast<uint8_t*>(staging_.pointer) + place;
    std::memcpy(stage, from + at, size);
    check(cudaMemcpyAsync(static_cast<uint8_t*>(to) + at, stage, size, cudaMemcpyHostToDevice, stream_), "uploading");
    const cudaEvent_t done = event(false);
    check(cudaEventRecord(done, stream_), "uploading");
    ring_.commit(done);
  }
}

void Device::write(uint32_t id, uint64_t at, const void* data, uint64_t bytes) {
  enter();
  const Buffer& to = buffer(id, at, bytes, "writing a buffer");
  upload(static_cast<uint8_t*>(to.pointer) + at, data, bytes);
}

void Device::fill(uint32_t id, uint64_t at, uint64_t words, uint32_t value) {
  enter();
  const Buffer& to = buffer(id, at, words * 4, "filling a buffer");
  check(fillWords(reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(to.pointer) + at), words, value, stream_), "filling a buffer");
}

cudaEvent_t Device::event(bool timing) {
  auto& idle = timing ? idleTiming_ : idle_;
  if (!idle.empty()) {
    const cudaEvent_t found = idle.back();
    idle.pop_back();
    return found;
  }
  cudaEvent_t made = nullptr;
  check(cudaEventCreateWithFlags(&made, timing ? cudaEventDefault : cudaEventDisableTiming), "creating an event");
  events_++;
  return made;
}

Device::Pinned Device::pinned(size_t bytes) {
  const size_t size = sizeClass(bytes);
  if (const auto found = spare_.find(size); found != spare_.end()) {
    const Pinned block = found->second;
    spare_.erase(found);
    return block;
  }
  Pinned block{nullptr, size};
  check(cudaHostAlloc(&block.pointer, size, cudaHostAllocDefault), "allocating pinned memory");
  pinnedBytes_ += size;
  return block;
}

void Device::recycle(Pinned block) {
  if (block.pointer == nullptr) return;
  if (block.bytes <= kKeep) {
    spare_.emplace(block.bytes, block);
    return;
  }
  cudaFreeHost(block.pointer);
  pinnedBytes_ -= block.bytes;
}

uint64_t Device::read(const std::vector<Piece>& pieces) {
  enter();
  uint64_t bytes = 0;
  for (const Piece& piece : pieces) {
    buffer(piece.id, piece.at, piece.bytes, "reading a buffer");
    bytes += piece.bytes;
  }
  auto job = std::make_unique<Job>();
  job->block = pinned(bytes);
  job->result.data = static_cast<const uint8_t*>(job->block.pointer);
  job->result.bytes = bytes;
  uint8_t* to = static_cast<uint8_t*>(job->block.pointer);
  for (const Piece& piece : pieces) {
    const auto* from = static_cast<const uint8_t*>(buffers_.at(piece.id).pointer) + piece.at;
    const cudaError_t status = piece.bytes == 0           ? cudaSuccess
                               : piece.bytes <= kFewBytes ? copyFew(to, from, piece.bytes, stream_)
                                                          : cudaMemcpyAsync(to, from, piece.bytes, cudaMemcpyDeviceToHost, stream_);
    if (status != cudaSuccess) {
      recycle(job->block);
      throw failure(status, "reading a buffer");
    }
    to += piece.bytes;
  }
  return submit(std::move(job));
}

uint64_t Device::submit(std::unique_ptr<Job> job) {
  job->done = event(false);
  check(cudaEventRecord(job->done, stream_), "recording an event");
  const uint64_t token = nextJob_++;
  Job* shared = job.get();
  jobs_[token] = std::move(job);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    waiting_.emplace_back(token, shared);
  }
  wake_.notify_one();
  return token;
}

void Device::waitLoop() {
  cudaSetDevice(index_);
  for (;;) {
    uint64_t token;
    Job* job;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [this] { return stop_ || !waiting_.empty(); });
      if (stop_) return;
      std::tie(token, job) = waiting_.front();
      waiting_.pop_front();
    }
    // One stream: what was enqueued first is done first.
    job->result.status = cudaEventSynchronize(job->done);
    for (size_t i = 1; i < job->times.size() && job->result.status == cudaSuccess; i++) {
      float milliseconds = 0;
      job->result.status = cudaEventElapsedTime(&milliseconds, job->times[i - 1], job->times[i]);
      job->result.seconds.push_back(milliseconds * 1e-3);
    }
    notify_(token);
  }
}

void Device::complete(uint64_t token, const std::function<void(const Finished&)>& use) {
  const auto found = jobs_.find(token);
  if (found == jobs_.end()) return;
  const std::unique_ptr<Job> job = std::move(found->second);
  jobs_.erase(found);
  use(job->result);
  recycle(job->block);
  idle_.push_back(job->done);
  idleTiming_.insert(idleTiming_.end(), job->times.begin(), job->times.end());
}

Counters Device::counters() const {
  Counters all;
  all.bytes = bytes_;
  all.buffers = buffers_.size();
  all.programs = programs_.size();
  all.graphs = graphs_;
  all.reads = jobs_.size();
  all.pinnedBytes = pinnedBytes_;
  all.events = events_;
  return all;
}

void Device::dispose() {
  if (disposed_) return;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_one();
  if (waiter_.joinable()) waiter_.join();
  cudaSetDevice(index_);
  if (stream_) cudaStreamSynchronize(stream_);
  while (!programs_.empty()) unload(programs_.begin()->first);
  while (!buffers_.empty()) free(buffers_.begin()->first);
  if (stream_) cudaStreamSynchronize(stream_);
  for (auto& [token, job] : jobs_) {
    if (job->block.pointer) cudaFreeHost(job->block.pointer);
    cudaEventDestroy(job->done);
    for (const cudaEvent_t time : job->times) cudaEventDestroy(time);
  }
  jobs_.clear();
  for (const auto& [size, block] : spare_) cudaFreeHost(block.pointer);
  spare_.clear();
  if (staging_.pointer) cudaFreeHost(staging_.pointer);
  ring_.collect([](cudaEvent_t done) { return cudaEventDestroy(done), true; });
  for (const cudaEvent_t each : idle_) cudaEventDestroy(each);
  for (const cudaEvent_t each : idleTiming_) cudaEventDestroy(each);
  if (context_.workspace) cudaFree(context_.workspace);
  if (pool_) cudaMemPoolDestroy(pool_);
  if (stream_) cudaStreamDestroy(stream_);
  stream_ = nullptr;
  pinnedBytes_ = events_ = 0;
  disposed_ = true;
  cudaGetLastError();
}

}  // namespace fewbit
