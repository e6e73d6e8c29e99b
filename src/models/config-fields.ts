import { FewbitError } from "../core/errors.js";

/** A parsed `config.json`, or an object in it. */
export type Json = Readonly<Record<string, unknown>>;

/** Above any model there is, and small enough that no product of two leaves the safe integers. */
const MAX_SIZE = 2 ** 26 - 1;

/** Reads fields by the names that Llama's config.json has; `names` says what another family calls them. */
export class Fields {
  readonly json: Json;
  readonly #names: Json;

  constructor(json: Json, names: Readonly<Record<string, string>> = {}) {
    this.json = json;
    this.#names = names;
  }

  /** What the file calls a field. */
  name(field: string): string {
    return (this.#names[field] as string | undefined) ?? field;
  }

  /** The field as it stands; undefined when the file does not have it. */
  raw(field: string): unknown {
    return this.json[this.name(field)];
  }

  integer(field: string, max = MAX_SIZE): number {
    const value = this.raw(field);
    if (!Number.isInteger(value) || Number(value) < 1 || Number(value) > max)
      throw invalid(this.name(field), value, `an integer from 1 to ${max}`);
    return value as number;
  }

  /** null is what the file says, `absent` what it means when it says nothing. */
  optionalInteger(field: string, absent: number | null): number | null {
    const value = this.raw(field);
    if (value === undefined) return absent;
    return value === null ? null : this.integer(field);
  }

  positive(field: string, absent?: number): number {
    return positive(this.name(field), this.raw(field) ?? absent);
  }

  optionalPositive(field: string, absent: number | null): number | null {
    const value = this.raw(field);
    if (value === undefined) return absent;
    return value === null ? null : this.positive(field);
  }

  boolean(field: string, absent: boolean): boolean {
    const value = this.raw(field) ?? absent;
    if (typeof value !== "boolean") throw invalid(this.name(field), value, "true or false");
    return value;
  }

  /** A list, or null when it is left out. */
  list(field: string): readonly unknown[] | null {
    const value = this.raw(field) ?? null;
    if (value !== null && !Array.isArray(value)) throw invalid(this.name(field), value, "a list or null");
    return value;
  }

  tokenIds(field: string, vocabSize: number): number[] {
    const value = this.raw(field) ?? [];
    const ids: unknown[] = Array.isArray(value) ? value : [value];
    const legal = (id: unknown): id is number => Number.isInteger(id) && Number(id) >= 0 && Number(id) < vocabSize;
    if (!ids.every(legal)) throw invalid(this.name(field), value, `token ids below vocab_size = ${vocabSize}`);
    return ids;
  }
}

export function positive(field: string, value: unknown): number {
  if (typeof value !== "number" || !Number.isFinite(value) || value <= 0)
    throw invalid(field, value, "a positive number");
  return value;
}

export function invalid(field: string, value: unknown, expected: string): FewbitError {
  return new FewbitError("model/config", { field, value, expected });
}

export function unsupported(what: string, value: string, supported: readonly string[]): FewbitError {
  return new FewbitError("model/unsupported", { what, value, supported });
}
