import { expect } from "vitest";
import { FewbitError } from "../../src/core/errors.js";

/** The FewbitError that a promise must reject with. */
export async function failure(promise: Promise<unknown>): Promise<FewbitError> {
  const error = await promise.then(
    () => new Error("nothing was thrown"),
    (reason: unknown) => reason,
  );
  expect(error).toBeInstanceOf(FewbitError);
  return error as FewbitError;
}

/** The FewbitError that a function must throw. */
export function thrown(run: () => unknown): FewbitError {
  try {
    run();
  } catch (error) {
    expect(error).toBeInstanceOf(FewbitError);
    return error as FewbitError;
  }
  throw new Error("nothing was thrown");
}
