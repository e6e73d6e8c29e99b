import { Scope } from "../../core/dispose.js";
import { FewbitError } from "../../core/errors.js";
import type { BackendDevice, Capabilities, DeviceInfo } from "../backend.js";
import {
  type Addon,
  type AddonDevice,
  type Counters,
  codedError,
  loadAddon,
  type Probe,
  type ProbedDevice,
} from "./addon.js";
import { capabilityOf, codeFor, cudaCapabilities, LOWEST, trialFeatures } from "./capabilities.js";
import { NativeExecutable } from "./executable.js";
import { NATIVE_KERNELS } from "./kernels/table.js";

export interface CudaOptions {
  /** The device's index; default: the first that kernels are built for. */
  readonly index?: number;
}

/**
 * Opens a CUDA device through the native addon. Throws `device/unavailable` (addon not built, no driver, no device that
 * kernels are built for) and `build/addon-mismatch`.
 */
export function openCuda(options: CudaOptions = {}): CudaDevice {
  const addon = loadAddon(NATIVE_KERNELS);
  const probe = addon.probe();
  const device = choose(probe, options.index);
  if (codeFor(addon.architectures, capabilityOf(device)) === 0)
    throw unavailable(`${device.name} runs nothing that the addon is built for: ${addon.architectures}`);
  let handle: AddonDevice;
  try {
    handle = new addon.Device(device.index);
  } catch (cause) {
    throw unavailable(`${device.name}: ${(cause as Error).message}`, cause);
  }
  return new CudaDevice(handle, addon, probe, device, options.index !== undefined);
}

/** Why there is no CUDA device, in words, or the device to take. */
export function choose(probe: Probe, index?: number): ProbedDevice {
  const { driver, runtime, status, devices } = probe;
  if (driver === 0) throw unavailable("no NVIDIA driver is installed");
  if (driver < runtime && devices.length === 0)
    throw unavailable(`the driver is for CUDA ${version(driver)}, the addon needs ${version(runtime)}`);
  if (devices.length === 0)
    throw unavailable(status === "" ? "the driver finds no device" : `the driver says: ${status}`);
  const suits = (device: ProbedDevice) => capabilityOf(device) >= LOWEST;
  const device = index === undefined ? devices.find(suits) : devices.find((candidate) => candidate.index === index);
  if (device === undefined && index !== undefined) throw unavailable(`there is no device ${index}`);
  if (device === undefined || !suits(device)) {
    const names = (device === undefined ? devices : [device]).map(
      (each) => `${each.name} has compute capability ${each.major}.${each.minor}`,
    );
    throw unavailable(`${names.join(", ")}: ${LOWEST / 10}.0 is the lowest that kernels are built for`);
  }
  return device;
}

const version = (number: number): string => `${Math.floor(number / 1000)}.${Math.floor((number % 1000) / 10)}`;

const unavailable = (reason: string, cause?: unknown) =>
  new FewbitError("device/unavailable", { backend: "cuda", reason }, cause === undefined ? {} : { cause });

export class CudaDevice implements BackendDevice {
  readonly info: DeviceInfo;
  readonly capabilities: Capabilities;
  readonly kernels = NATIVE_KERNELS;
  readonly lost: Promise<string>;
  readonly #handle: AddonDevice;
  readonly #scope = new Scope("cuda device");
  #lost: string | null = null;
  #tellLost: (reason: string) => void = () => {};

  constructor(handle: AddonDevice, addon: Addon, probe: Probe, device: ProbedDevice, asked: boolean) {
    this.#handle = handle;
    const blas = handle.blas();
    this.capabilities = cudaCapabilities(
      device,
      [...(blas.version > 0 ? ["cublaslt"] : []), ...trialFeatures(process.env.FEWBIT_CUDA_TRIAL)],
      codeFor(addon.architectures, capabilityOf(device)),
    );
    this.info = {
      backend: "cuda",
      name: device.name,
      kind: "hardware",
      reason: asked ? `device ${device.index} was asked for` : "the first CUDA device that kernels are built for",
      detail: {
        driver: `CUDA ${version(probe.driver)}`,
        runtime: `CUDA ${version(probe.runtime)}`,
        capability: `${device.major}.${device.minor}`,
        multiprocessors: String(device.multiprocessors),
        architectures: addon.architectures,
        cublaslt: blas.version > 0 ? String(blas.version) : `none: ${blas.reason}`,
      },
    };
    this.lost = new Promise((resolve) => {
      this.#tellLost = resolve;
    });
  }

  get bytes(): number {
    return this.counters.bytes;
  }

  /** What is alive on the device, for leak tests. */
  get counters(): Counters {
    return this.#handle.counters();
  }

  /** Calls the addon: its failures become coded errors, and a sticky one marks the device lost. */
  call<T>(body: (handle: AddonDevice) => T): T {
    this.#scope.assertLive();
    if (this.#lost !== null) throw new FewbitError("device/lost", { reason: this.#lost });
    try {
      return body(this.#handle);
    } catch (error) {
      throw this.#judge(error);
    }
  }

  /** `call` for what the device answers later. */
  async wait<T>(body: (handle: AddonDevice) => Promise<T>): Promise<T> {
    try {
      return await this.call(body);
    } catch (error) {
      this.#scope.assertLive();
      throw this.#judge(error);
    }
  }

  /** A buffer that is freed with `owner`. Returns its number. */
  buffer(owner: Scope, bytes: number): number {
    const id = this.call((handle) => handle.allocate(bytes));
    owner.add({ [Symbol.dispose]: () => this.#handle.free(id) });
    return id;
  }

  /** A program that is unloaded with `owner`. Returns its number. */
  program(owner: Scope, text: Parameters<AddonDevice["load"]>[0]): number {
    const id = this.call((handle) => handle.load(text));
    owner.add({ [Symbol.dispose]: () => this.#handle.unload(id) });
    return id;
  }

  async load(...[plan, weights, options]: Parameters<BackendDevice["load"]>): Promise<NativeExecutable> {
    this.#scope.assertLive();
    return NativeExecutable.load(this, new Scope("program", this.#scope), plan, weights, options);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#scope.disposed) return;
    this.#scope.dispose();
    this.#handle.dispose();
  }

  #judge(error: unknown): unknown {
    const coded = codedError(error);
    if (coded instanceof FewbitError && coded.code === "device/lost" && this.#lost === null) {
      this.#lost = (coded as FewbitError<"device/lost">).context.reason;
      this.#tellLost(this.#lost);
    }
    return coded;
  }
}
