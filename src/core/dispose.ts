import { FewbitError } from "./errors.js";

/**
 * Owns disposables: disposing a scope disposes what was added, newest first, and then detaches from its parent scope,
 * so disposing a parent disposes its children and disposing a child twice is harmless.
 */
export class Scope implements Disposable {
  readonly #name: string;
  readonly #parent: Scope | undefined;
  readonly #children = new Set<Disposable>();
  #disposed = false;

  constructor(name: string, parent?: Scope) {
    this.#name = name;
    this.#parent = parent;
    parent?.add(this);
  }

  get disposed(): boolean {
    return this.#disposed;
  }

  add<T extends Disposable>(child: T): T {
    this.assertLive();
    this.#children.add(child);
    return child;
  }

  /** Forgets a child without disposing it. */
  release(child: Disposable): void {
    this.#children.delete(child);
  }

  assertLive(): void {
    if (this.#disposed) throw new FewbitError("object/disposed", { object: this.#name });
  }

  dispose(): void {
    if (this.#disposed) return;
    this.#disposed = true;
    for (const child of [...this.#children].reverse()) child[Symbol.dispose]();
    this.#children.clear();
    this.#parent?.release(this);
  }

  [Symbol.dispose](): void {
    this.dispose();
  }
}
