// A CUDA device with one stream: buffers, programs, and reads that another thread waits for. No JavaScript here.
#pragma once
#include <cuda_runtime.h>

#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "failure.hpp"
#include "fewbit/cublaslt.hpp"
#include "fewbit/launch.hpp"
#include "fewbit/registry.hpp"
#include "ring.hpp"

namespace fewbit {

/** A launch of a program as it was described: buffers by id. */
struct LaunchText {
  std::string entry, label;
  std::vector<uint32_t> buffers;
  std::vector<int64_t> args;
};

struct BucketText {
  std::vector<uint32_t> largest;  // the symbols that a captured graph is laid out for
  bool capture = false;
  std::vector<LaunchText> launches;
};

/** What is alive on a device; everything is zero again when nothing is held, pinned memory and events aside, which are kept. */
struct Counters {
  uint64_t bytes = 0, buffers = 0, programs = 0, graphs = 0, reads = 0, pinnedBytes = 0, events = 0;
};

/** What a wait ended with. `finish` must be called on the device's own thread. */
struct Finished {
  cudaError_t status = cudaSuccess;
  const uint8_t* data = nullptr;
  size_t bytes = 0;
  std::vector<double> seconds;  // of each launch, for a profile
};

class Device {
 public:
  /** Called on the waiting thread when a read or profile is over; must arrange for `complete(token)` on the own thread. */
  using Notify = std::function<void(uint64_t token)>;

  Device(int index, Notify notify);
  ~Device();
  Device(const Device&) = delete;

  uint32_t allocate(uint64_t bytes);
  void free(uint32_t id);
  void write(uint32_t id, uint64_t at, const void* data, uint64_t bytes);
  /** Fills words with a value. */
  void fill(uint32_t id, uint64_t at, uint64_t words, uint32_t value);

  struct Piece {
    uint32_t id;
    uint64_t at, bytes;
  };
  /** Enqueues copies of the pieces, one after another in one block; returns the token that `notify` will be called with. */
  uint64_t read(const std::vector<Piece>& pieces);

  uint32_t load(uint32_t symbols, const std::vector<BucketText>& buckets);
  void unload(uint32_t program);
  /** Runs a bucket, with `replay` as a graph even if its runs are not; the symbols are copied. Returns the number of launches. */
  size_t run(uint32_t program, size_t bucket, const uint32_t* symbols, size_t count, bool replay);
  /** Runs a bucket with an event after every launch. */
  uint64_t profile(uint32_t program, size_t bucket, const uint32_t* symbols, size_t count);

  /** Ends a read or profile: `use` sees its result, then its memory is kept for the next one. */
  void complete(uint64_t token, const std::function<void(const Finished&)>& use);

  /** The version of the cuBLASLt that was found, or 0 and why there is none. */
  size_t blasVersion() const { return context_.blas ? context_.blas->version : 0; }
  const char* blasReason() const { return blasReason_; }

  Counters counters() const;
  /** Waits for the device, stops the waiting thread and frees everything. Pending reads are dropped. */
  void dispose();
  bool disposed() const { return disposed_; }

 private:
  struct Buffer {
    void* pointer;
    uint64_t bytes;
  };
  struct Call {
    const Entry* entry;
    std::string label;
    std::vector<void*> buffers;
    std::vector<uint64_t> sizes;
    std::vector<int64_t> args;
  };
  struct Bucket {
    std::vector<uint32_t> largest;
    bool capture = false;
    uint64_t runs = 0;
    std::vector<Call> calls;
    cudaGraphExec_t graph = nullptr;
  };
  struct Program {
    uint32_t symbols = 0;
    void* deviceSymbols = nullptr;
    std::vector<Bucket> buckets;
  };
  struct Pinned {
    void* pointer = nullptr;
    size_t bytes = 0;
  };
  struct Job {
    cudaEvent_t done = nullptr;
    Pinned block;
    Finished result;
    std::vector<cudaEvent_t> times;  // one more than launches
  };

  void enter();
  const Buffer& buffer(uint32_t id, uint64_t at, uint64_t bytes, const char* operation) const;
  void* raw(uint64_t bytes, const char* what);
  void release(void* pointer);
  void upload(void* to, const void* data, uint64_t bytes);
  cudaEvent_t event(bool timing);
  Pinned pinned(size_t bytes);
  void recycle(Pinned block);
  Program& program(uint32_t id, size_t bucket, size_t symbols);
  void writeSymbols(Program& program, const uint32_t* symbols);
  void launchAll(const Program& program, const Bucket& bucket, const uint32_t* symbols, const std::vector<cudaEvent_t>* times);
  void capture(const Program& program, Bucket& bucket);
  uint64_t submit(std::unique_ptr<Job> job);
  void waitLoop();

  int index_;
  Notify notify_;
  Context context_;
  const char* blasReason_ = "";
  cudaStream_t stream_ = nullptr;
  cudaMemPool_t pool_ = nullptr;
  std::unordered_map<uint32_t, Buffer> buffers_;
  std::unordered_map<uint32_t, Program> programs_;
  uint32_t nextBuffer_ = 1, nextProgram_ = 1;
  uint64_t bytes_ = 0, pinnedBytes_ = 0, events_ = 0, graphs_ = 0;
  Pinned staging_;
  Ring<cudaEvent_t> ring_;
  std::vector<cudaEvent_t> idle_, idleTiming_;
  std::multimap<size_t, Pinned> spare_;
  bool disposed_ = false;

  // Shared with the waiting thread.
  mutable std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::pair<uint64_t, Job*>> waiting_;
  bool stop_ = false;
  std::thread waiter_;
  std::unordered_map<uint64_t, std::unique_ptr<Job>> jobs_;
  uint64_t nextJob_ = 1;
};

/** Whether the addon's code for the current device was made for compute capability 9 or more, as overlapped launches need. */
bool waitsForPredecessors();
/** Fills 32-bit words. */
cudaError_t fillWords(uint32_t* words, uint64_t count, uint32_t value, cudaStream_t stream);

/**
 * Up to so many bytes are moved by kernels, which follow each other faster than the copy unit and they do: what is stored is a parameter, and
 * what is copied goes to or from pinned memory.
 */
constexpr size_t kFewBytes = 256;
/** Stores 1 to kFewBytes bytes of the host's; `data` is free again on return. */
cudaError_t storeFew(void* to, const void* data, size_t bytes, cudaStream_t stream);
cudaError_t copyFew(void* to, const void* from, size_t bytes, cudaStream_t stream);

}  // namespace fewbit
