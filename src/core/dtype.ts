/** Dtypes of unpacked tensors. f16 and bf16 travel as raw bits in a Uint16Array (Node 20 has no Float16Array). */
export type FloatType = "f32" | "f16" | "bf16";
export type DType = FloatType | "i32" | "u32" | "i8" | "u8";

export const BYTES: Readonly<Record<DType, number>> = { f32: 4, f16: 2, bf16: 2, i32: 4, u32: 4, i8: 1, u8: 1 };

/** The typed array that holds elements of each dtype. */
export interface ArrayOf {
  f32: Float32Array;
  f16: Uint16Array;
  bf16: Uint16Array;
  i32: Int32Array;
  u32: Uint32Array;
  i8: Int8Array;
  u8: Uint8Array;
}
export type TypedArray = ArrayOf[DType];

const CONSTRUCTORS = {
  f32: Float32Array,
  f16: Uint16Array,
  bf16: Uint16Array,
  i32: Int32Array,
  u32: Uint32Array,
  i8: Int8Array,
  u8: Uint8Array,
} as const;

/** A zero-filled array of `length` elements. */
export function allocate<D extends DType>(dtype: D, length: number): ArrayOf[D] {
  return new CONSTRUCTORS[dtype](length) as ArrayOf[D];
}

/** Views `bytes` as elements of `dtype`, copying only when the offset is not aligned. */
export function viewAs<D extends DType>(dtype: D, bytes: Uint8Array): ArrayOf[D] {
  const size = BYTES[dtype];
  const aligned = bytes.byteOffset % size === 0 ? bytes : new Uint8Array(bytes);
  return new CONSTRUCTORS[dtype](
    aligned.buffer as ArrayBuffer,
    aligned.byteOffset,
    aligned.byteLength / size,
  ) as ArrayOf[D];
}

const floatView = new Float32Array(1);
const bitsView = new Uint32Array(floatView.buffer);

/** The IEEE bits of a float32. */
export function f32Bits(value: number): number {
  floatView[0] = value;
  return bitsView[0] as number;
}

/** The float32 with these bits. */
export function f32FromBits(bits: number): number {
  bitsView[0] = bits;
  return floatView[0] as number;
}

/** Rounds a float32 to bfloat16 bits: nearest, ties to even, subnormals kept, any NaN becomes 0x7fff. */
export function f32ToBf16Bits(value: number): number {
  const bits = f32Bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return ((bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16) & 0xffff;
}

export function bf16BitsToF32(bits: number): number {
  return f32FromBits(bits << 16);
}

/** Rounds a float32 to float16 bits: nearest, ties to even, gradual underflow, overflow to infinity, any NaN becomes 0x7fff. */
export function f32ToF16Bits(value: number): number {
  const bits = f32Bits(value);
  const sign = (bits >>> 16) & 0x8000;
  const magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;
  if (magnitude < 0x38800000) {
    // Below the smallest normal: one unit is 2^-24, and roundEven of the exact quotient is the code.
    return sign | roundEven(f32FromBits(magnitude) * 2 ** 24);
  }
  const rounded = magnitude + 0xfff + ((magnitude >>> 13) & 1);
  return sign | ((rounded - 0x38000000) >>> 13);
}

export function f16BitsToF32(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >>> 10) & 0x1f;
  const mantissa = bits & 0x3ff;
  if (exponent === 0) return sign * mantissa * 2 ** -24;
  if (exponent === 31) return mantissa === 0 ? sign * Number.POSITIVE_INFINITY : Number.NaN;
  return sign * (1 + mantissa / 1024) * 2 ** (exponent - 15);
}

/** Rounds to the nearest integer, ties to even (IEEE roundToIntegralTiesToEven); NaN and infinities pass through. */
export function roundEven(value: number): number {
  const floor = Math.floor(value);
  const fraction = value - floor;
  if (fraction < 0.5) return floor;
  if (fraction > 0.5) return floor + 1;
  return floor % 2 === 0 ? floor : floor + 1;
}

/**
 * `rnd_dt` of the numerics specification, section 1: rounds to the nearest value of `dtype`, ties to even.
 * `value` must be the exact result of one operation on float32 operands (float64 has enough bits, section 1).
 */
export function roundTo(dtype: FloatType, value: number): number {
  const single = Math.fround(value);
  if (dtype === "f32") return single;
  return dtype === "bf16" ? bf16BitsToF32(f32ToBf16Bits(single)) : f16BitsToF32(f32ToF16Bits(single));
}

/** Widens any dtype to float32 (integers exactly up to 2^24). The result is in `into`, where that is large enough. */
export function toFloat32(dtype: DType, data: TypedArray, into?: Float32Array): Float32Array {
  if (dtype === "f32") return data as Float32Array;
  const out = into && into.length >= data.length ? into.subarray(0, data.length) : new Float32Array(data.length);
  if (dtype === "bf16") {
    const bits = new Uint32Array(out.buffer, out.byteOffset, out.length);
    for (let i = 0; i < bits.length; i++) bits[i] = (data[i] as number) << 16;
  } else if (dtype === "f16") {
    for (let i = 0; i < out.length; i++) out[i] = f16BitsToF32(data[i] as number);
  } else out.set(data);
  return out;
}

/** Rounds float32 values to `dtype`, ties to even. */
export function fromFloat32<D extends FloatType>(dtype: D, data: Float32Array): ArrayOf[D] {
  if (dtype === "f32") return data as ArrayOf[D];
  const encode = dtype === "bf16" ? f32ToBf16Bits : f32ToF16Bits;
  const out = new Uint16Array(data.length);
  for (let i = 0; i < out.length; i++) out[i] = encode(data[i] as number);
  return out as ArrayOf[D];
}
