/**
 * WGSL float32 arithmetic on bits, correctly rounded (nearest, ties to even) with subnormals, infinities and NaN, on every
 * device: WGSL promises none of that (division may err by 2.5 units, subnormals may be flushed, the rounding mode is free,
 * products and sums may be contracted). Everything is integer arithmetic except one quotient estimate, which is corrected by
 * its exact remainder. Operands and results are the bits of float32 numbers; every NaN result is `0x7fc00000`.
 *
 * There are no branches, `&&` and `||` included: compilers that inline everything and merge branches (SwiftShader's) take
 * exponential time and memory over them.
 *
 * Functions: `exact_mul`, `exact_div`, `exact_add`, `exact_sub`, `exact_round_even` and `exact_to_int` (to an integer), `exact_bf16` and
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
  return (exact_key(a) < exact_key(b)) & !(zeros | exact_is_nan(a) | exact_is_nan(b));
}
// NaN passes through; -0 is below a bound of 0.
fn exact_clamp(a: u32, low: u32, high: u32) -> u32 {
  let key = min(max(exact_key(a), exact_key(low)), exact_key(high));
  return select(exact_from_key(key), a, exact_is_nan(a));
}

// Biased exponent and 24-bit significand (leading bit set) of a finite number; of zero, garbage and 0.
fn exact_parts(magnitude: u32) -> vec2<u32> {
  let field = max(magnitude >> 23u, 1u);
  let shift = select(0u, countLeadingZeros(magnitude) - 8u, magnitude < 0x800000u);
  return vec2<u32>(field - shift, (magnitude - ((field - 1u) << 23u)) << (shift & 31u));
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
  let larger = max(a & 0x7fffffffu, b & 0x7fffffffu);
  let smaller = min(a & 0x7fffffffu, b & 0x7fffffffu);
  let l = exact_parts(larger);
  let s = exact_parts(smaller);
  // The product in two parts of 24 bits.
  let middle = (l.y >> 12u) * (s.y & 0xfffu) + (l.y & 0xfffu) * (s.y >> 12u);
  let low = (l.y & 0xfffu) * (s.y & 0xfffu) + ((middle & 0xfffu) << 12u);
  let high = (l.y >> 12u) * (s.y >> 12u) + (middle >> 12u) + (low >> 24u);
  let tail = low & 0xffffffu;
  let long = high >> 23u;
  let taken = 20u + long;
  let lost = (tail & ((1u << taken) - 1u)) != 0u;
  let significand = (high << (24u - taken)) | (tail >> taken) | select(0u, 1u, lost);
  let product = exact_pack(sign, bitcast<i32>(l.x + s.x + long) - 127, significand);
  let zero_or_infinity = sign | select(0u, 0x7f800000u, larger == 0x7f800000u);
  let special = (larger > 0x7f800000u) | ((larger == 0x7f800000u) & (smaller == 0u));
  return select(
    select(product, zero_or_infinity, (smaller == 0u) | (larger == 0x7f800000u)),
    0x7fc00000u, special);
}

fn exact_div(a: u32, b: u32) -> u32 {
  let sign = (a ^ b) & 0x80000000u;
  let ma = a & 0x7fffffffu;
  let mb = b & 0x7fffffffu;
  let n = exact_parts(ma);
  let d = exact_parts(mb);
  let lift = select(0u, 1u, n.y < d.y);
  let dividend = n.y << lift;
  // quotient = floor(dividend * 2^23 / d.y), between 2^23 and 2^24. The estimate is at most four off (division may err by 2.5
  // units, and its unit is 1 here), so the low 32 bits of the remainder tell it exactly: from 8 below, 15 steps up.
  var quotient = u32(f32(dividend) / f32(d.y) * 8388608.0) - 8u;
  var remainder = (dividend << 23u) - quotient * d.y;
  for (var step = 8u; step > 0u; step >>= 1u) {
    let over = remainder >= d.y * step;
    quotient += select(0u, step, over);
    remainder -= select(0u, d.y * step, over);
  }
  let twice = 2u * remainder;
  let significand = (quotient << 3u) | select(0u, 4u, twice >= d.y) | select(0u, 1u, (remainder != 0u) & (twice != d.y));
  let ratio = exact_pack(sign, bitcast<i32>(n.x - d.x - lift) + 127, significand);
  let infinite = (ma == 0x7f800000u) | (mb == 0u);
  let special = (max(ma, mb) > 0x7f800000u) | ((ma == mb) & ((ma == 0u) | infinite));
  return select(
    select(ratio, sign | select(0u, 0x7f800000u, infinite), infinite | (ma == 0u) | (mb == 0x7f800000u)),
    0x7fc00000u, special);
}

fn exact_add(a: u32, b: u32) -> u32 {
  let swap = (a & 0x7fffffffu) < (b & 0x7fffffffu);
  let larger = select(a, b, swap);
  let ml = larger & 0x7fffffffu;
  let ms = select(b, a, swap) & 0x7fffffffu;
  let opposite = (a ^ b) >= 0x80000000u;
  let el = max(ml >> 23u, 1u);
  let es = max(ms >> 23u, 1u);
  let l = (ml - ((el - 1u) << 23u)) << 3u;
  let s = (ms - ((es - 1u) << 23u)) << 3u;
  let shift = min(el - es, 27u);
  let aligned = (s >> shift) | select(0u, 1u, (s & ((1u << shift) - 1u)) != 0u);
  let sum = select(l + aligned, l - aligned, opposite);
  // Brings the leading bit to place 26: one to the right after a carry, or to the left after cancellation.
  let zeros = countLeadingZeros(sum);
  let carry = zeros < 5u;
  let left = select(zeros - 5u, 0u, carry);
  let significand = select(sum << (left & 31u), (sum >> 1u) | (sum & 1u), carry);
  let total = exact_pack(larger & 0x80000000u, bitcast<i32>(el - left + select(0u, 1u, carry)), significand);
  let special = (ml > 0x7f800000u) | ((ms == 0x7f800000u) & opposite);
  return select(
    select(select(total, 0u, sum == 0u), select(larger, a & b, ml == 0u), (ms == 0u) | (ml == 0x7f800000u)),
    0x7fc00000u, special);
}

fn exact_sub(a: u32, b: u32) -> u32 { return exact_add(a, b ^ 0x80000000u); }

// The nearest integer, ties to even, as a float32; infinities and NaN pass through.
fn exact_round_even(a: u32) -> u32 {
  let magnitude = a & 0x7fffffffu;
  // The place of the unit in the significand. Numbers below one have none: up to one half they are zero, the rest is one.
  let place = 150u - clamp(magnitude >> 23u, 127u, 149u);
  let odd = (((magnitude & 0x7fffffu) | 0x800000u) >> place) & 1u;
  let rounded = (magnitude + (1u << (place - 1u)) - 1u + odd) & ~((1u << place) - 1u);
  let small = select(0u, 0x3f800000u, magnitude > 0x3f000000u);
  let near = select(rounded, small, magnitude < 0x3f800000u);
  return (a & 0x80000000u) | select(near, magnitude, magnitude >= 0x4b000000u);
}

// The nearest integer, ties to even, cut at 2^23 in magnitude; NaN is 0.
fn exact_to_int(a: u32) -> i32 {
  let magnitude = a & 0x7fffffffu;
  let place = 150u - clamp(magnitude >> 23u, 125u, 149u);
  let significand = (magnitude & 0x7fffffu) | 0x800000u;
  let rounded = (significand + (1u << (place - 1u)) - 1u + ((significand >> place) & 1u)) >> place;
  let size = i32(select(select(rounded, 0x800000u, magnitude >= 0x4b000000u), 0u, magnitude > 0x7f800000u));
  return select(size, -size, a >= 0x80000000u);
}

fn exact_bf16(a: u32) -> u32 {
  return select((a + 0x7fffu + ((a >> 16u) & 1u)) & 0xffff0000u, 0x7fc00000u, exact_is_nan(a));
}

fn exact_f16(a: u32) -> u32 {
  let magnitude = a & 0x7fffffffu;
  // Below 2^-14 the unit is 2^-24: a multiple of it is an integer of the float32 that is 2^24 times as large.
  let unit = 24u << 23u;
  let integer = exact_round_even(magnitude + unit);
  let subnormal = select(integer - unit, 0u, (integer == 0u) | (magnitude < 0x800000u));
  let normal = (magnitude + 0xfffu + ((magnitude >> 13u) & 1u)) & 0xffffe000u;
  let finite = select(normal, subnormal, magnitude < 0x38800000u);
  let limited = select(finite, 0x7f800000u, magnitude >= 0x477ff000u);
  return select((a & 0x80000000u) | limited, 0x7fc00000u, magnitude > 0x7f800000u);
}
`;
