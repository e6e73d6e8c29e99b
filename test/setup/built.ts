import { execFile } from "node:child_process";
import { mkdir, mkdtemp, rm, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";

const run = promisify(execFile);
const root = fileURLToPath(new URL("../..", import.meta.url));

export interface Finished {
  readonly code: number | null;
  readonly signal: string | null;
  readonly stdout: string;
  readonly stderr: string;
}

/** Source files compiled as the package ships them, for tests that need processes of their own. */
export class Built implements AsyncDisposable {
  readonly folder: string;

  private constructor(folder: string) {
    this.folder = folder;
  }

  /** Compiles `files` (paths under `src/`) and what they import. */
  static async of(...files: string[]): Promise<Built> {
    await mkdir(join(root, ".cache"), { recursive: true });
    const folder = await mkdtemp(join(root, ".cache", "built-"));
    const config = {
      extends: "../../tsconfig.build.json",
      compilerOptions: { rootDir: "../../src", outDir: ".", declaration: false, sourceMap: false },
      include: [],
      files: files.map((file) => `../../src/${file}`),
    };
    await writeFile(join(folder, "tsconfig.json"), JSON.stringify(config));
    const tsc = join(dirname(createRequire(import.meta.url).resolve("typescript/package.json")), "bin", "tsc");
    await run(process.execPath, [tsc, "-p", folder]);
    return new Built(folder);
  }

  /** Runs `script` (an ES module that imports `./<path under src>.js`) in a new process. */
  async node(script: string, env: NodeJS.ProcessEnv = {}, timeout = 30_000): Promise<Finished> {
    return new Promise((resolve) => {
      const merged = { ...process.env, ...env };
      for (const [name, value] of Object.entries(env)) if (value === undefined) delete merged[name];
      const options = { cwd: this.folder, env: merged, timeout, killSignal: "SIGKILL" as const };
      const child = execFile(process.execPath, ["--input-type=module", "-e", script], options, (_, stdout, stderr) =>
        resolve({ code: child.exitCode, signal: child.signalCode, stdout, stderr }),
      );
    });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await rm(this.folder, { recursive: true, force: true });
  }
}
