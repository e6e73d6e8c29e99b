const live = new Set<GPUDevice>();

/** Remembers every GPUDevice that is opened here, so that its loss can be forced. */
export function trackDevices(): void {
  // A browser without WebGPU has no such class; the page says so before anything is opened.
  if (typeof GPUAdapter === "undefined") return;
  const { requestDevice } = GPUAdapter.prototype;
  GPUAdapter.prototype.requestDevice = async function (...args) {
    const device = await requestDevice.apply(this, args);
    live.add(device);
    device.lost.then(() => live.delete(device));
    return device;
  };
}

/** Destroys all of them, as a driver that crashes does, and answers how many there were. */
export function destroyAll(): number {
  const devices = [...live];
  for (const device of devices) device.destroy();
  return devices.length;
}
