/**
 * WGSL float32 arithmetic on bits, correctly rounded (nearest, ties to even) with subnormals, infinities and NaN, on every
 * device: WGSL promises none of that (division may err by 2.5 units, subnormals may be flushed, the rounding mode is free,
 * products and sums may be contracted). Everything is integer arithmetic except one quotient estimate, which is corrected by
 * its exact remainder. Operands and results are the bits of float32 numbers; every NaN result is `0x7fc00000`.
 *
 * Functions: `exact_mul`, `exact_div`, `exact_add`, `exact_sub`, `exact_round_even` (to an integer), `exact_bf16` and
 * `exact_f16` (to the nearest number of that type), `exact_less`, `exact_clamp` (lets NaN through), `exact_is_nan`,
 * and `exact_key` / `exact_from_key`, an order-preserving map to u32 for minima and maxima.
 */
export const EXACT = /* wgsl */ `
fn exact_is_nan(a: u32) -> bool { return (a & 0x7fffffffu) > 0x7f800000u; }

// A larger number has a larger key; -0 comes just before 0.
fn exact_key(a: u32) -> u32 { return select(a | 0x80000000u, ~a, a >= 0x80000000u); }
fn exact_from_key(key: u32) -> u32 { return select(~key, key & 0x7fffffffu, key >= 0x80000000u); }

// False when either is NaN; zeros are equal.
fn exact_less(a: u32, b: u32) -> bool {
  let zeros = ((a | b) & 0x7fffffffu) == 0u;
  return !zeros && !exact_is_nan(a) && !exact_is_nan(b) && exact_key(a) < exact_key(b);
}
fn exact_clamp(a: u32, low: u32, high: u32) -> u32 {
  return select(select(a, high, exact_less(high, a)), low, exact_less(a, low));
}

// Biased exponent and 24-bit significand (leading bit set) of a finite number that is not zero.
fn exact_parts(magnitude: u32) -> vec2<i32> {
  let field = magnitude >> 23u;
  if (field != 0u) { return vec2<i32>(i32(field), i32((magnitude & 0x7fffffu) | 0x800000u)); }
  let shift = countLeadingZeros(magnitude) - 8u;
  return vec2<i32>(1 - i32(shift), i32(magnitude << shift));
}

// Rounds significand * 2^(exponent - 127 - 26): bit 26 leads, the last of its three extra bits stands for all that was lost.
fn exact_pack(sign: u32, exponent: i32, significand: u32) -> u32 {
  let shift = u32(clamp(1 - exponent, 0, 28));
  let lost = (significand & ((1u << shift) - 1u)) != 0u;
  let kept = (significand >> shift) | select(0u, 1u, lost);
  let rounded = (kept + 3u + ((kept >> 3u) & 1u)) >> 3u;
  return sign | min((u32(clamp(exponent, 1, 255) - 1) << 23u) + rounded, 0x7f800000u);
}

fn exact_mul(a: u32, b: u32) -> u32 {
  let sign = (a ^ b) & 0x80000000u;
  let ma = a & 0x7fffffffu;
  let mb = b & 0x7fffffffu;
  if (max(ma, mb) >= 0x7f800000u) {
    return select(sign | 0x7f800000u, 0x7fc00000u, max(ma, mb) > 0x7f800000u || min(ma, mb) == 0u);
  }
  if (min(ma, mb) == 0u) { return sign; }
  let pa = exact_parts(ma);
  let pb = exact_parts(mb);
  let a1 = u32(pa.y) >> 12u;
  let a0 = u32(pa.y) & 0xfffu;
  let b1 = u32(pb.y) >> 12u;
  let b0 = u32(pb.y) & 0xfffu;
  // The product in two parts of 24 bits.
  let middle = a1 * b0 + a0 * b1;
  let low = a0 * b0 + ((middle & 0xfffu) << 12u);
  let high = a1 * b1 + (middle >> 12u) + (low >> 24u);
  let long = high >= 0x800000u;
  let taken = select(20u, 21u, long);
  let tail = low & 0xffffffu;
  let lost = (tail & ((1u << taken) - 1u)) != 0u;
  let significand = (high << (24u - taken)) | (tail >> taken) | select(0u, 1u, lost);
  return exact_pack(sign, pa.x + pb.x - 127 + select(0, 1, long), significand);
}

fn exact_div(a: u32, b: u32) -> u32 {
  let sign = (a ^ b) & 0x80000000u;
  let ma = a & 0x7fffffffu;
  let mb = b & 0x7fffffffu;
  if (max(ma, mb) > 0x7f800000u) { return 0x7fc00000u; }
  if (ma == mb && (ma == 0u || ma == 0x7f800000u)) { return 0x7fc00000u; }
  if (ma == 0u || mb == 0x7f800000u) { return sign; }
  if (mb == 0u || ma == 0x7f800000u) { return sign | 0x7f800000u; }
  let pa = exact_parts(ma);
  let pb = exact_parts(mb);
  let lift = select(0u, 1u, pa.y < pb.y);
  let divisor = pb.y;
  let dividend = u32(pa.y) << lift;
  // quotient = floor(dividend * 2^23 / divisor), between 2^23 and 2^24. The estimate is a few units off, so the low 32 bits
  // of the remainder are enough to see by how much.
  var quotient = u32(f32(dividend) / f32(divisor) * 8388608.0);
  var remainder = bitcast<i32>((dividend << 23u) - quotient * u32(divisor));
  while (remainder < 0) {
    quotient -= 1u;
    remainder += divisor;
  }
  while (remainder >= divisor) {
    quotient += 1u;
    remainder -= divisor;
  }
  let twice = 2 * remainder;
  let half = twice >= divisor;
  let lost = remainder != 0 && twice != divisor;
  let significand = (quotient << 3u) | select(0u, 4u, half) | select(0u, 1u, lost);
  return exact_pack(sign, pa.x - pb.x + 127 - i32(lift), significand);
}

fn exact_add(a: u32, b: u32) -> u32 {
  let larger = select(b, a, (a & 0x7fffffffu) >= (b & 0x7fffffffu));
  let smaller = select(a, b, (a & 0x7fffffffu) >= (b & 0x7fffffffu));
  let ml = larger & 0x7fffffffu;
  let ms = smaller & 0x7fffffffu;
  let opposite = ((larger ^ smaller) & 0x80000000u) != 0u;
  if (ml >= 0x7f800000u) {
    return select(larger, 0x7fc00000u, ml > 0x7f800000u || (ms == 0x7f800000u && opposite));
  }
  if (ms == 0u) { return select(larger, a & b, ml == 0u); }
  let el = max(ml >> 23u, 1u);
  let es = max(ms >> 23u, 1u);
  let l = (ml - ((el - 1u) << 23u)) << 3u;
  let s = (ms - ((es - 1u) << 23u)) << 3u;
  let shift = min(el - es, 27u);
  let aligned = (s >> shift) | select(0u, 1u, (s & ((1u << shift) - 1u)) != 0u);
  let sum = select(l + aligned, l - aligned, opposite);
  if (sum == 0u) { return 0u; }
  // Brings the leading bit to place 26: one to the right after a carry, or to the left after cancellation.
  let zeros = countLeadingZeros(sum);
  let carry = zeros < 5u;
  let left = select(zeros - 5u, 0u, carry);
  let significand = select(sum << left, (sum >> 1u) | (sum & 1u), carry);
  return exact_pack(larger & 0x80000000u, i32(el) - i32(left) + select(0, 1, carry), significand);
}

fn exact_sub(a: u32, b: u32) -> u32 { return exact_add(a, b ^ 0x80000000u); }

// The nearest integer, ties to even, as a float32; infinities and NaN pass through.
fn exact_round_even(a: u32) -> u32 {
  let magnitude = a & 0x7fffffffu;
  if (magnitude >= 0x4b000000u) { return a; }
  // Up to one half is zero, and the rest below one is one.
  if (magnitude < 0x3f800000u) { return (a & 0x80000000u) | select(0u, 0x3f800000u, magnitude > 0x3f000000u); }
  let unit = 1u << (150u - (magnitude >> 23u));
  let odd = select(0u, 1u, (((magnitude & 0x7fffffu) | 0x800000u) & unit) != 0u);
  return (a & 0x80000000u) | ((magnitude + (unit >> 1u) - 1u + odd) & ~(unit - 1u));
}

fn exact_bf16(a: u32) -> u32 {
  return select((a + 0x7fffu + ((a >> 16u) & 1u)) & 0xffff0000u, 0x7fc00000u, exact_is_nan(a));
}

fn exact_f16(a: u32) -> u32 {
  let sign = a & 0x80000000u;
  let magnitude = a & 0x7fffffffu;
  if (magnitude > 0x7f800000u) { return 0x7fc00000u; }
  if (magnitude >= 0x477ff000u) { return sign | 0x7f800000u; }
  if (magnitude >= 0x38800000u) { return sign | ((magnitude + 0xfffu + ((magnitude >> 13u) & 1u)) & 0xffffe000u); }
  // Below 2^-14 the unit is 2^-24. Adding 0.5, whose unit that is, rounds, and subtracting it is exact.
  return sign | exact_sub(exact_add(magnitude, 0x3f000000u), 0x3f000000u);
}
`;
