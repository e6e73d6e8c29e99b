import fc from "fast-check";
import { expect, test } from "vitest";
import { stopScanner } from "../../src/text/stop.js";

const pieces = fc.array(fc.string({ unit: fc.constantFrom("a", "b", "\n"), maxLength: 4 }), { maxLength: 12 });
const stops = fc.array(fc.string({ unit: fc.constantFrom("a", "b", "\n"), minLength: 1, maxLength: 4 }), {
  maxLength: 3,
});

test("however a text is cut into pieces, what is shown ends before the first stop string that is complete", () => {
  fc.assert(
    fc.property(pieces, stops, (parts, wanted) => {
      const scanner = stopScanner(wanted);
      let [shown, seen] = ["", ""];
      for (const part of parts) {
        shown += scanner.push(part);
        seen += part;
        const found = wanted.map((stop) => seen.indexOf(stop)).filter((at) => at >= 0);
        expect(scanner.stopped).toBe(found.length > 0);
        // Nothing is shown that a stop string begins with, and nothing else is held back for long.
        expect(seen.startsWith(shown)).toBe(true);
        if (scanner.stopped) {
          expect(shown).toBe(seen.slice(0, Math.min(...found)));
          return;
        }
        const longest = Math.max(0, ...wanted.map((stop) => stop.length - 1));
        expect(seen.length - shown.length).toBeLessThanOrEqual(longest);
      }
      expect(shown + scanner.flush()).toBe(seen);
    }),
  );
});

test("empty strings never stop", () => {
  const scanner = stopScanner([""]);
  expect([scanner.push("text"), scanner.stopped]).toEqual(["text", false]);
});
