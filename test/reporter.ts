import { writeSync } from "node:fs";
import type { Reporter, SerializedError, TestModule } from "vitest/node";

/**
 * Prints `N passed, N failed` as the last line of a run. A test file that fails to load, a failed suite hook and an
 * error outside every test each count as one failure, so `0 failed` always means a green run.
 */
export default class TallyReporter implements Reporter {
  #passed = 0;
  #failed = 0;
  #ended = false;

  onTestRunEnd(modules: readonly TestModule[], unhandled: readonly SerializedError[]): void {
    this.#passed = 0;
    this.#failed = unhandled.length;
    for (const module of modules) {
      this.#failed += module.errors().length;
      for (const suite of module.children.allSuites()) this.#failed += suite.errors().length;
      for (const test of module.children.allTests()) {
        const { state } = test.result();
        if (state === "passed") this.#passed++;
        else if (state === "failed") this.#failed++;
      }
    }
    if (modules.length === 0) this.#failed++;
    if (this.#ended) return;
    this.#ended = true;
    // At exit, so that nothing another reporter still has to print comes after the line.
    process.on("exit", () => {
      if (this.#failed > 0) process.exitCode ||= 1;
      writeSync(1, `${this.#passed} passed, ${this.#failed} failed\n`);
    });
  }
}
