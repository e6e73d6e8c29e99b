/** How often k-means looks whether it has converged. */
const CHECK_EVERY = 10;

/**
 * Learns `entries` centers [entries, size] of points [count, size] into `centers` (specification 16): a greedy start
 * (point 0, then again and again the point farthest from all chosen ones), then at most `iterations` of k-means. A
 * center without points stays where it is. Scalar `points` are sorted in place.
 */
export function learnCenters(
  points: Float32Array,
  size: number,
  entries: number,
  iterations: number,
  centers: Float32Array,
): void {
  if (points.length === 0) return;
  if (size === 1) learnScalars(points, entries, iterations, centers);
  else learnVectors(points, size, entries, iterations, centers);
}

/** Whether a center moved enough for another round. */
const moved = (now: number, before: number) => Math.abs(now - before) > 1e-8 + 1e-6 * Math.abs(before);

function learnVectors(
  points: Float32Array,
  size: number,
  entries: number,
  iterations: number,
  centers: Float32Array,
): void {
  const count = points.length / size;
  const distances = new Float32Array(count).fill(Number.POSITIVE_INFINITY);
  let farthest = 0;
  for (let center = 0; center < entries; center++) {
    const chosen = points.subarray(farthest * size, (farthest + 1) * size);
    centers.set(chosen, center * size);
    let greatest = -1;
    for (let p = 0; p < count; p++) {
      let squared = 0;
      for (let i = 0; i < size; i++) squared += ((points[p * size + i] as number) - (chosen[i] as number)) ** 2;
      if (squared < (distances[p] as number)) distances[p] = squared;
      if ((distances[p] as number) > greatest) {
        greatest = distances[p] as number;
        farthest = p;
      }
    }
  }
  const sums = new Float64Array(entries * size);
  const counts = new Float64Array(entries);
  for (let iteration = 1; iteration <= iterations; iteration++) {
    sums.fill(0);
    counts.fill(0);
    const nearest = nearestCenter(centers, entries, size);
    for (let p = 0; p < count; p++) {
      const center = nearest(points, p * size);
      counts[center] = (counts[center] as number) + 1;
      for (let i = 0; i < size; i++)
        sums[center * size + i] = (sums[center * size + i] as number) + (points[p * size + i] as number);
    }
    let restless = false;
    for (let i = 0; i < centers.length; i++) {
      const members = counts[Math.floor(i / size)] as number;
      if (members === 0) continue;
      const before = centers[i] as number;
      centers[i] = (sums[i] as number) / members;
      restless ||= moved(centers[i] as number, before);
    }
    if (iteration % CHECK_EVERY === 0 && !restless) return;
  }
}

/** In one dimension clusters are runs of the sorted points: means come from prefix sums, borders from binary search. */
function learnScalars(points: Float32Array, entries: number, iterations: number, centers: Float32Array): void {
  const count = points.length;
  const first = points[0] as number;
  const sorted = points.sort();
  const prefix = new Float64Array(count + 1);
  for (let i = 0; i < count; i++) prefix[i + 1] = (prefix[i] as number) + (sorted[i] as number);
  chooseStart(sorted, first, entries, centers);
  const order = Array.from(centers.keys()).sort((a, b) => (centers[a] as number) - (centers[b] as number) || a - b);
  for (let iteration = 1; iteration <= iterations; iteration++) {
    const before = centers.slice();
    let begin = 0;
    for (const [rank, center] of order.entries()) {
      const next = order[rank + 1];
      const border =
        next === undefined ? Number.POSITIVE_INFINITY : ((before[center] as number) + (before[next] as number)) / 2;
      // A point on the border goes to the first entry, as in nearestCenter.
      const end = next === undefined ? count : next < center ? lowerBound(sorted, border) : upperBound(sorted, border);
      if (end > begin) centers[center] = ((prefix[end] as number) - (prefix[begin] as number)) / (end - begin);
      begin = Math.max(begin, end);
    }
    if (iteration % CHECK_EVERY === 0 && !centers.some((value, i) => moved(value, before[i] as number))) return;
  }
}

/** The greedy start: between two neighbouring centers the farthest point lies next to their middle. */
function chooseStart(sorted: Float32Array, first: number, entries: number, centers: Float32Array): void {
  const chosen = [first];
  centers[0] = first;
  for (let center = 1; center < entries; center++) {
    let [farthest, greatest] = [first, 0];
    const consider = (value: number, distance: number) => {
      if (distance > greatest) [farthest, greatest] = [value, distance];
    };
    const [least, most] = [sorted[0] as number, sorted.at(-1) as number];
    consider(least, (chosen[0] as number) - least);
    for (let i = 0; i + 1 < chosen.length; i++) {
      const [low, high] = [chosen[i] as number, chosen[i + 1] as number];
      const at = lowerBound(sorted, (low + high) / 2);
      for (const value of [sorted[at - 1], sorted[at]]) {
        if (value !== undefined && value >= low && value <= high) consider(value, Math.min(value - low, high - value));
      }
    }
    consider(most, most - (chosen.at(-1) as number));
    centers[center] = farthest;
    chosen.splice(lowerBound(chosen, farthest), 0, farthest);
  }
}

/** The index of the first element that is not below `value`. */
function lowerBound(sorted: ArrayLike<number>, value: number): number {
  let [low, high] = [0, sorted.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if ((sorted[middle] as number) < value) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** The index of the first element above `value`. */
function upperBound(sorted: ArrayLike<number>, value: number): number {
  let [low, high] = [0, sorted.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if ((sorted[middle] as number) <= value) low = middle + 1;
    else high = middle;
  }
  return low;
}

/**
 * A function that finds the entry nearest to the point at `points[at ..]`, the first on ties. Scalar tables are
 * searched in sorted order.
 */
export function nearestCenter(
  centers: Float32Array,
  entries: number,
  size: number,
): (points: Float32Array, at: number) => number {
  if (size > 1) {
    return (points, at) => {
      let best = 0;
      let least = Number.POSITIVE_INFINITY;
      for (let center = 0; center < entries; center++) {
        let squared = 0;
        for (let i = 0; i < size && squared < least; i++) {
          squared += ((points[at + i] as number) - (centers[center * size + i] as number)) ** 2;
        }
        if (squared < least) {
          least = squared;
          best = center;
        }
      }
      return best;
    };
  }
  const order = Array.from(centers.keys()).sort((a, b) => (centers[a] as number) - (centers[b] as number) || a - b);
  const sorted = Float64Array.from(order, (index) => centers[index] as number);
  // Of equal centers only the first can be nearest; it stands for the others.
  const names = order.map((_, i) => order[sorted.indexOf(sorted[i] as number)] as number);
  return (points, at) => {
    const value = points[at] as number;
    const above = Math.min(Math.max(lowerBound(sorted, value), 1), Math.max(entries - 1, 1));
    const [low, high] = [above - 1, Math.min(above, entries - 1)];
    const [down, up] = [Math.abs(value - (sorted[low] as number)), Math.abs((sorted[high] as number) - value)];
    const [first, second] = [names[low] as number, names[high] as number];
    return up < down || (up === down && second < first) ? second : first;
  };
}
