import { FewbitError } from "../core/errors.js";

/**
 * A strict pull parser for JSON headers that nobody vouches for. `JSON.parse` is not enough there: it drops duplicate
 * keys, rounds integers above 2^53, and turns a small hostile text into a large heap. Here the reader of a format asks for
 * what its grammar allows and everything else fails at once, with the character where it stood.
 */
export class JsonCursor {
  readonly #text: string;
  readonly #path: string;
  #at = 0;

  constructor(text: string, path: string) {
    this.#text = text;
    this.#path = path;
  }

  /** The `io/malformed` error of this file. */
  error(reason: string): FewbitError<"io/malformed"> {
    return new FewbitError("io/malformed", { path: this.#path, reason });
  }

  /** Reads an object; `member` must read the value of each key. A key that comes twice is an error. */
  object(what: string, member: (key: string) => void): void {
    const keys = new Set<string>();
    this.#sequence(what, "{", "}", () => {
      const key = this.string(`a key of ${what}`);
      if (keys.has(key)) throw this.error(`${what} has the key ${label(key)} twice`);
      keys.add(key);
      if (this.#peek() !== ":") throw this.#unexpected(`":" after a key of ${what}`);
      this.#at++;
      member(key);
    });
  }

  /** Reads an array; `item` must read each item. */
  array(what: string, item: () => void): void {
    this.#sequence(what, "[", "]", item);
  }

  /** Reads a string of well-formed Unicode. */
  string(what: string): string {
    if (this.#peek() !== '"') throw this.#unexpected(`${what} (a string)`);
    const start = this.#at;
    let escaped = false;
    let end = start + 1;
    for (; ; end++) {
      const unit = this.#text.charCodeAt(end);
      if (unit === 0x22) break;
      // NaN, past the end, fails this comparison too.
      if (!(unit >= 0x20)) throw this.error(`${what} is not a complete JSON string, at character ${start}`);
      if (unit === 0x5c) {
        escaped = true;
        end++;
      }
    }
    this.#at = end + 1;
    const value = escaped ? this.#unescape(this.#text.slice(start, end + 1), what) : this.#text.slice(start + 1, end);
    if (/\p{Surrogate}/u.test(value)) throw this.error(`${what} is not well-formed Unicode, at character ${start}`);
    return value;
  }

  /** Reads an integer from 0 to 2^53 - 1, written without sign, point or exponent. */
  integer(what: string): number {
    this.#peek();
    const digits = this.#take(/(?:0|[1-9]\d{0,30})(?![\d.eE])/y);
    if (digits === undefined) throw this.#unexpected(`${what} (a nonnegative integer)`);
    const value = Number(digits);
    if (!Number.isSafeInteger(value)) throw this.error(`${what} is ${digits}, which is above 2^53 - 1`);
    return value;
  }

  /** Passes over any value, nested at most `depth` deep, and keeps nothing of it. */
  skip(what: string, depth: number): void {
    const next = this.#peek();
    if ((next === "{" || next === "[") && depth === 0) throw this.error(`${what} is nested too deeply`);
    if (next === "{") this.object(what, () => this.skip(what, depth - 1));
    else if (next === "[") this.array(what, () => this.skip(what, depth - 1));
    else if (next === '"') this.string(what);
    else if (this.#take(/true|false|null|-?(?:0|[1-9]\d{0,30})(?:\.\d{1,30})?(?:[eE][+-]?\d{1,4})?/y) === undefined)
      throw this.#unexpected(`a value of ${what}`);
  }

  /** Checks that only white space is left. */
  end(): void {
    if (this.#peek() !== undefined) throw this.#unexpected("the end of the JSON text");
  }

  #sequence(what: string, open: string, close: string, item: () => void): void {
    if (this.#peek() !== open) throw this.#unexpected(`${what} ("${open}")`);
    this.#at++;
    if (this.#peek() === close) {
      this.#at++;
      return;
    }
    for (;;) {
      item();
      const next = this.#peek();
      if (next !== "," && next !== close) throw this.#unexpected(`"," or "${close}" in ${what}`);
      this.#at++;
      if (next === close) return;
    }
  }

  #unescape(literal: string, what: string): string {
    try {
      return JSON.parse(literal) as string;
    } catch {
      throw this.error(`${what} has an illegal escape`);
    }
  }

  #take(pattern: RegExp): string | undefined {
    pattern.lastIndex = this.#at;
    const taken = pattern.exec(this.#text)?.[0];
    this.#at += taken?.length ?? 0;
    return taken;
  }

  /** The next character that is not white space; undefined at the end. */
  #peek(): string | undefined {
    for (; this.#at < this.#text.length; this.#at++) {
      const next = this.#text.charAt(this.#at);
      if (next !== " " && next !== "\n" && next !== "\r" && next !== "\t") return next;
    }
    return undefined;
  }

  #unexpected(expected: string): FewbitError<"io/malformed"> {
    const got = this.#at < this.#text.length ? JSON.stringify(this.#text.charAt(this.#at)) : "the end";
    return this.error(`the JSON has ${got} at character ${this.#at} where ${expected} is expected`);
  }
}

/** A name from a file, quoted and cut, so that a hostile one cannot flood a message. */
export function label(name: string): string {
  return JSON.stringify(name.length > 120 ? `${name.slice(0, 120)}...` : name);
}
