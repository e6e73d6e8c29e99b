// The programs of a device: launches laid down once, run one by one or replayed as a graph.
#include <algorithm>

#include "device.hpp"

namespace fewbit {

uint32_t Device::load(uint32_t symbols, const std::vector<BucketText>& buckets) {
  enter();
  Program made;
  made.symbols = symbols;
  for (const BucketText& text : buckets) {
    if (text.largest.size() != symbols) throw Failure(Failure::Kind::error, "loading a program", "a bucket has another number of symbols");
    Bucket bucket;
    bucket.largest = text.largest;
    bucket.capture = text.capture;
    for (const LaunchText& launch : text.launches) {
      Call call;
      call.entry = find(launch.entry.c_str());
      if (call.entry == nullptr) throw Failure(Failure::Kind::error, "loading a program", "there is no entry " + launch.entry);
      call.label = launch.label;
      call.args = launch.args;
      for (const uint32_t id : launch.buffers) {
        const Buffer& bound = buffer(id, 0, 0, "loading a program");
        call.buffers.push_back(bound.pointer);
        call.sizes.push_back(bound.bytes);
      }
      bucket.calls.push_back(std::move(call));
    }
    made.buckets.push_back(std::move(bucket));
  }
  made.deviceSymbols = raw(std::max<uint64_t>(256, symbols * 4), "allocating a program's symbols");
  const uint32_t id = nextProgram_++;
  programs_.emplace(id, std::move(made));
  return id;
}

void Device::unload(uint32_t id) {
  if (disposed_) return;
  const auto found = programs_.find(id);
  if (found == programs_.end()) return;
  cudaSetDevice(index_);
  bool graphs = false;
  for (const Bucket& bucket : found->second.buckets) graphs = graphs || bucket.graph != nullptr;
  if (graphs) cudaStreamSynchronize(stream_);
  for (const Bucket& bucket : found->second.buckets) {
    if (bucket.graph == nullptr) continue;
    cudaGraphExecDestroy(bucket.graph);
    graphs_--;
  }
  release(found->second.deviceSymbols);
  programs_.erase(found);
}

Device::Program& Device::program(uint32_t id, size_t bucket, size_t symbols) {
  const auto found = programs_.find(id);
  if (found == programs_.end()) throw Failure(Failure::Kind::error, "running a program", "it does not exist");
  if (bucket >= found->second.buckets.size()) throw Failure(Failure::Kind::error, "running a program", "it has no such bucket");
  if (symbols != found->second.symbols) throw Failure(Failure::Kind::error, "running a program", "it has another number of symbols");
  return found->second;
}

void Device::writeSymbols(Program& program, const uint32_t* symbols) {
  if (program.symbols > 0) upload(program.deviceSymbols, symbols, program.symbols * 4);
}

void Device::launchAll(const Program& program, const Bucket& bucket, const uint32_t* symbols, const std::vector<cudaEvent_t>* times) {
  Launch launch;
  launch.context = &context_;
  launch.symbols = symbols;
  launch.deviceSymbols = static_cast<const uint32_t*>(program.deviceSymbols);
  launch.stream = stream_;
  if (times) check(cudaEventRecord((*times)[0], stream_), "timing");
  for (size_t i = 0; i < bucket.calls.size(); i++) {
    const Call& call = bucket.calls[i];
    launch.buffers = call.buffers.data();
    launch.sizes = call.sizes.data();
    launch.bufferCount = static_cast<int>(call.buffers.size());
    launch.args = call.args.data();
    launch.argCount = static_cast<int>(call.args.size());
    if (const cudaError_t status = call.entry->run(launch); status != cudaSuccess)
      throw failure(status, std::string(call.entry->name) + " (" + call.label + ")");
    if (times) check(cudaEventRecord((*times)[i + 1], stream_), "timing");
  }
}

void Device::capture(const Program& program, Bucket& bucket) {
  check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeRelaxed), "capturing a graph");
  cudaGraph_t graph = nullptr;
  try {
    launchAll(program, bucket, bucket.largest.data(), nullptr);
  } catch (...) {
    cudaStreamEndCapture(stream_, &graph);
    if (graph) cudaGraphDestroy(graph);
    cudaGetLastError();
    throw;
  }
  check(cudaStreamEndCapture(stream_, &graph), "capturing a graph");
  const cudaError_t status = cudaGraphInstantiate(&bucket.graph, graph, 0);
  cudaGraphDestroy(graph);
  check(status, "building a graph");
  graphs_++;
}

size_t Device::run(uint32_t id, size_t index, const uint32_t* symbols, size_t count, bool replay) {
  enter();
  Program& owner = program(id, index, count);
  Bucket& bucket = owner.buckets[index];
  writeSymbols(owner, symbols);
  // The first run is plain: it loads the kernels, so that nothing but launches is left to capture.
  if (replay || (bucket.capture && bucket.runs > 0)) {
    if (bucket.graph == nullptr) capture(owner, bucket);
    check(cudaGraphLaunch(bucket.graph, stream_), "launching a graph");
  } else {
    launchAll(owner, bucket, symbols, nullptr);
  }
  bucket.runs++;
  return bucket.calls.size();
}

uint64_t Device::profile(uint32_t id, size_t index, const uint32_t* symbols, size_t count) {
  enter();
  Program& owner = program(id, index, count);
  const Bucket& bucket = owner.buckets[index];
  writeSymbols(owner, symbols);
  auto job = std::make_unique<Job>();
  try {
    for (size_t i = 0; i <= bucket.calls.size(); i++) job->times.push_back(event(true));
    launchAll(owner, bucket, symbols, &job->times);
  } catch (...) {
    idleTiming_.insert(idleTiming_.end(), job->times.begin(), job->times.end());
    throw;
  }
  return submit(std::move(job));
}

}  // namespace fewbit
