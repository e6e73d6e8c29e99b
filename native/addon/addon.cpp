// What JavaScript sees. Every CUDA failure becomes an Error with `cuda: { kind, operation, reason, needed, limit }`.
#include <napi.h>

#include <cstring>
#include <memory>

#include "device.hpp"

namespace fewbit {
namespace {

/** Grows when this interface changes; src/backends/native/addon.ts names the one it is written for. */
constexpr uint32_t kAbi = 1;

Napi::Error toError(Napi::Env env, const Failure& failure) {
  Napi::Error error = Napi::Error::New(env, failure.operation + ": " + failure.what());
  Napi::Object detail = Napi::Object::New(env);
  const char* kinds[] = {"error", "memory", "lost"};
  detail.Set("kind", kinds[static_cast<int>(failure.kind)]);
  detail.Set("operation", failure.operation);
  detail.Set("reason", failure.what());
  detail.Set("needed", Napi::Number::New(env, static_cast<double>(failure.needed)));
  detail.Set("limit", Napi::Number::New(env, static_cast<double>(failure.limit)));
  error.Value().Set("cuda", detail);
  return error;
}

/** Runs `body`; failures become JavaScript errors. */
template <class Body>
auto guarded(Napi::Env env, Body body) {
  try {
    return body();
  } catch (const Failure& failure) {
    throw toError(env, failure);
  } catch (const Napi::Error&) {
    throw;
  } catch (const std::exception& other) {
    throw toError(env, Failure(Failure::Kind::error, "the addon", other.what()));
  }
}

uint64_t whole(const Napi::Value& value, const char* what) {
  const double number = value.IsNumber() ? value.As<Napi::Number>().DoubleValue() : -1;
  if (!(number >= 0 && number <= 9007199254740991.0) || number != static_cast<double>(static_cast<uint64_t>(number)))
    throw Napi::TypeError::New(value.Env(), std::string(what) + " must be a non-negative integer");
  return static_cast<uint64_t>(number);
}

template <class Item, class Read>
std::vector<Item> list(const Napi::Value& value, Read read) {
  if (!value.IsArray()) throw Napi::TypeError::New(value.Env(), "an array is expected");
  const Napi::Array array = value.As<Napi::Array>();
  std::vector<Item> items;
  items.reserve(array.Length());
  for (uint32_t i = 0; i < array.Length(); i++) items.push_back(read(array.Get(i)));
  return items;
}

int64_t integer(const Napi::Value& value) {
  if (!value.IsNumber()) throw Napi::TypeError::New(value.Env(), "an arg must be a number");
  return value.As<Napi::Number>().Int64Value();
}

struct Bytes {
  const uint8_t* data;
  size_t size;
};

Bytes bytesOf(const Napi::Value& value) {
  if (value.IsTypedArray()) {
    const Napi::TypedArray view = value.As<Napi::TypedArray>();
    return {static_cast<const uint8_t*>(view.ArrayBuffer().Data()) + view.ByteOffset(), view.ByteLength()};
  }
  if (value.IsDataView()) {
    const Napi::DataView view = value.As<Napi::DataView>();
    return {static_cast<const uint8_t*>(view.ArrayBuffer().Data()) + view.ByteOffset(), view.ByteLength()};
  }
  throw Napi::TypeError::New(value.Env(), "a typed array is expected");
}

class DeviceWrap : public Napi::ObjectWrap<DeviceWrap> {
 public:
  static Napi::Function define(Napi::Env env) {
    return DefineClass(env, "Device",
                       {InstanceMethod<&DeviceWrap::allocate>("allocate"), InstanceMethod<&DeviceWrap::free>("free"),
                        InstanceMethod<&DeviceWrap::write>("write"), InstanceMethod<&DeviceWrap::fill>("fill"),
                        InstanceMethod<&DeviceWrap::read>("read"), InstanceMethod<&DeviceWrap::load>("load"),
                        InstanceMethod<&DeviceWrap::run>("run"), InstanceMethod<&DeviceWrap::profile>("profile"),
                        InstanceMethod<&DeviceWrap::unload>("unload"), InstanceMethod<&DeviceWrap::counters>("counters"),
                        InstanceMethod<&DeviceWrap::blas>("blas"),
                        InstanceMethod<&DeviceWrap::dispose>("dispose")});
  }

  explicit DeviceWrap(const Napi::CallbackInfo& info) : ObjectWrap(info) {
    const Napi::Env env = info.Env();
    const int index = static_cast<int>(whole(info[0], "the device's index"));
    const auto nothing = Napi::Function::New(env, [](const Napi::CallbackInfo&) {});
    // Calls that are on their way when the device is disposed still find this object: it is let go after the last of them. When
    // this constructor fails there is no object any more, and nothing to let go.
    done_ = Napi::ThreadSafeFunction::New(env, nothing, "fewbit reads", 0, 1, [this, released = released_](Napi::Env) {
      if (*released) Unref();
    });
    done_.Unref(env);
    // Runs before the environment closes the thread-safe function, which was made before.
    napi_add_env_cleanup_hook(env, &DeviceWrap::cleanup, this);
    try {
      device_ = guarded(env, [&] {
        return std::make_unique<Device>(index, [this](uint64_t token) {
          done_.NonBlockingCall(this, [token](Napi::Env inner, Napi::Function, DeviceWrap* self) {
            if (inner != nullptr) self->settle(inner, token);
          });
        });
      });
    } catch (...) {
      napi_remove_env_cleanup_hook(env, &DeviceWrap::cleanup, this);
      done_.Release();
      throw;
    }
    Ref();
  }

 private:
  Napi::Value allocate(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] { return Napi::Number::New(info.Env(), device_->allocate(whole(info[0], "bytes"))); });
  }

  void free(const Napi::CallbackInfo& info) { device_->free(static_cast<uint32_t>(whole(info[0], "a buffer"))); }

  void write(const Napi::CallbackInfo& info) {
    guarded(info.Env(), [&] {
      const Bytes bytes = bytesOf(info[2]);
      device_->write(static_cast<uint32_t>(whole(info[0], "a buffer")), whole(info[1], "an offset"), bytes.data, bytes.size);
    });
  }

  void fill(const Napi::CallbackInfo& info) {
    guarded(info.Env(), [&] {
      device_->fill(static_cast<uint32_t>(whole(info[0], "a buffer")), whole(info[1], "an offset"), whole(info[2], "words"),
                    static_cast<uint32_t>(whole(info[3], "a word")));
    });
  }

  /** read(buffers, offsets, bytes): a promise of one ArrayBuffer with the pieces one after another. */
  Napi::Value read(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] {
      const auto number = [](const Napi::Value& value) { return whole(value, "a piece"); };
      const auto ids = list<uint64_t>(info[0], number), at = list<uint64_t>(info[1], number), bytes = list<uint64_t>(info[2], number);
      if (at.size() != ids.size() || bytes.size() != ids.size())
        throw Napi::TypeError::New(info.Env(), "buffers, offsets and sizes differ in number");
      std::vector<Device::Piece> pieces;
      for (size_t i = 0; i < ids.size(); i++) pieces.push_back({static_cast<uint32_t>(ids[i]), at[i], bytes[i]});
      return wait(info.Env(), device_->read(pieces), "reading a buffer");
    });
  }

  /** load({ symbols, buckets: [{ largest, capture, launches: [{ entry, label, buffers, args }] }] }): a program's number. */
  Napi::Value load(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] {
      const Napi::Object text = info[0].As<Napi::Object>();
      const auto buckets = list<BucketText>(text.Get("buckets"), [](const Napi::Value& value) {
        const Napi::Object object = value.As<Napi::Object>();
        BucketText bucket;
        bucket.largest = list<uint32_t>(object.Get("largest"), [](const Napi::Value& each) { return static_cast<uint32_t>(whole(each, "a symbol")); });
        bucket.capture = object.Get("capture").ToBoolean();
        bucket.launches = list<LaunchText>(object.Get("launches"), [](const Napi::Value& each) {
          const Napi::Object launch = each.As<Napi::Object>();
          LaunchText made;
          made.entry = launch.Get("entry").ToString();
          made.label = launch.Get("label").ToString();
          made.buffers = list<uint32_t>(launch.Get("buffers"), [](const Napi::Value& id) { return static_cast<uint32_t>(whole(id, "a buffer")); });
          made.args = list<int64_t>(launch.Get("args"), integer);
          return made;
        });
        return bucket;
      });
      return Napi::Number::New(info.Env(), device_->load(static_cast<uint32_t>(whole(text.Get("symbols"), "symbols")), buckets));
    });
  }

  /** run(program, bucket, symbols: Uint32Array, replay): the number of launches. */
  Napi::Value run(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] {
      const Bytes symbols = bytesOf(info[2]);
      const size_t launches = device_->run(static_cast<uint32_t>(whole(info[0], "a program")), whole(info[1], "a bucket"),
                                           reinterpret_cast<const uint32_t*>(symbols.data), symbols.size / 4, info[3].ToBoolean());
      return Napi::Number::New(info.Env(), static_cast<double>(launches));
    });
  }

  /** profile(program, bucket, symbols): a promise of the seconds of every launch as float64. */
  Napi::Value profile(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] {
      const Bytes symbols = bytesOf(info[2]);
      const uint64_t token = device_->profile(static_cast<uint32_t>(whole(info[0], "a program")), whole(info[1], "a bucket"),
                                              reinterpret_cast<const uint32_t*>(symbols.data), symbols.size / 4);
      return wait(info.Env(), token, "timing a run");
    });
  }

  void unload(const Napi::CallbackInfo& info) { device_->unload(static_cast<uint32_t>(whole(info[0], "a program"))); }

  Napi::Value counters(const Napi::CallbackInfo& info) {
    const Counters all = device_->counters();
    Napi::Object object = Napi::Object::New(info.Env());
    const auto set = [&](const char* name, uint64_t value) { object.Set(name, Napi::Number::New(info.Env(), static_cast<double>(value))); };
    set("bytes", all.bytes);
    set("buffers", all.buffers);
    set("programs", all.programs);
    set("graphs", all.graphs);
    set("reads", all.reads);
    set("pinnedBytes", all.pinnedBytes);
    set("events", all.events);
    return object;
  }

  /** blas(): the version of cuBLASLt, or 0 and why it is not there. */
  Napi::Value blas(const Napi::CallbackInfo& info) {
    Napi::Object object = Napi::Object::New(info.Env());
    object.Set("version", Napi::Number::New(info.Env(), static_cast<double>(device_->blasVersion())));
    object.Set("reason", device_->blasReason() ? device_->blasReason() : "");
    return object;
  }

  void dispose(const Napi::CallbackInfo& info) {
    if (device_->disposed()) return;
    const Napi::Env env = info.Env();
    close();
    napi_remove_env_cleanup_hook(env, &DeviceWrap::cleanup, this);
    const Failure gone(Failure::Kind::error, "waiting for the device", "it was disposed");
    for (auto& [token, pending] : pending_) pending.deferred.Reject(toError(env, gone).Value());
    pending_.clear();
    *released_ = true;
  }

  static void cleanup(void* self) { static_cast<DeviceWrap*>(self)->close(); }

  void close() {
    device_->dispose();
    done_.Release();
  }

  Napi::Value wait(Napi::Env env, uint64_t token, const char* operation) {
    const auto made = pending_.emplace(token, Pending{Napi::Promise::Deferred::New(env), operation}).first;
    // While something is waited for the process stays.
    if (pending_.size() == 1) done_.Ref(env);
    return made->second.deferred.Promise();
  }

  void settle(Napi::Env env, uint64_t token) {
    const auto found = pending_.find(token);
    if (found == pending_.end()) return;
    const Pending pending = found->second;
    pending_.erase(found);
    if (pending_.empty()) done_.Unref(env);
    device_->complete(token, [&](const Finished& finished) {
      if (finished.status != cudaSuccess) {
        pending.deferred.Reject(toError(env, failure(finished.status, pending.operation)).Value());
        return;
      }
      const void* data = finished.seconds.empty() ? static_cast<const void*>(finished.data) : finished.seconds.data();
      const size_t size = finished.seconds.empty() ? finished.bytes : finished.seconds.size() * sizeof(double);
      Napi::ArrayBuffer result = Napi::ArrayBuffer::New(env, size);
      if (size > 0) std::memcpy(result.Data(), data, size);
      pending.deferred.Resolve(result);
    });
  }

  struct Pending {
    Napi::Promise::Deferred deferred;
    const char* operation;
  };
  std::unique_ptr<Device> device_;
  Napi::ThreadSafeFunction done_;
  std::unordered_map<uint64_t, Pending> pending_;
  std::shared_ptr<bool> released_ = std::make_shared<bool>(false);
};

/** probe(): what this machine has; never throws, `reason` says why there are no devices. */
Napi::Value probe(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  Napi::Object found = Napi::Object::New(env);
  Napi::Array devices = Napi::Array::New(env);
  int driver = 0, runtime = 0, count = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  cudaRuntimeGetVersion(&runtime);
  const cudaError_t status = cudaGetDeviceCount(&count);
  cudaGetLastError();
  found.Set("driver", driver);
  found.Set("runtime", runtime);
  found.Set("status", status == cudaSuccess ? "" : cudaGetErrorString(status));
  for (int i = 0; status == cudaSuccess && i < count; i++) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, i) != cudaSuccess) continue;
    int clock = 0, memoryClock = 0;
    cudaDeviceGetAttribute(&clock, cudaDevAttrClockRate, i);
    cudaDeviceGetAttribute(&memoryClock, cudaDevAttrMemoryClockRate, i);
    Napi::Object device = Napi::Object::New(env);
    const auto set = [&](const char* name, double value) { device.Set(name, Napi::Number::New(env, value)); };
    device.Set("name", properties.name);
    set("index", i);
    set("major", properties.major);
    set("minor", properties.minor);
    set("multiprocessors", properties.multiProcessorCount);
    set("memory", static_cast<double>(properties.totalGlobalMem));
    set("sharedMemory", static_cast<double>(properties.sharedMemPerBlockOptin));
    set("cache", properties.l2CacheSize);
    set("clock", clock * 1e3);
    set("memoryClock", memoryClock * 1e3);
    set("busWidth", properties.memoryBusWidth);
    devices.Set(devices.Length(), device);
  }
  cudaGetLastError();
  found.Set("devices", devices);
  return found;
}

Napi::Object init(Napi::Env env, Napi::Object exports) {
  Napi::Array entries = Napi::Array::New(env);
  for (const Entry& entry : registry()) {
    Napi::Object each = Napi::Object::New(env);
    each.Set("name", entry.name);
    each.Set("abi", entry.abi);
    entries.Set(entries.Length(), each);
  }
  exports.Set("abi", kAbi);
  exports.Set("entries", entries);
  exports.Set("architectures", FEWBIT_ARCHITECTURES);
  exports.Set("probe", Napi::Function::New(env, probe, "probe"));
  exports.Set("Device", DeviceWrap::define(env));
  return exports;
}

}  // namespace
}  // namespace fewbit

static Napi::Object Init(Napi::Env env, Napi::Object exports) { return fewbit::init(env, exports); }
NODE_API_MODULE(fewbit, Init)
