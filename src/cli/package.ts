import { existsSync, readFileSync } from "node:fs";
import { dirname, join, relative } from "node:path";
import { fileURLToPath } from "node:url";
import { FewbitError } from "../core/errors.js";

const NAME = "fewbit";
export const BUNDLED_MODEL = "fewbit-tiny";

/** The package this file is part of: the nearest folder above it whose package.json has our name. */
export const PACKAGE = findPackage();

function findPackage(): { readonly folder: string; readonly version: string } {
  for (let folder = dirname(fileURLToPath(import.meta.url)); ; folder = dirname(folder)) {
    const manifest = join(folder, "package.json");
    if (existsSync(manifest)) {
      const { name, version } = JSON.parse(readFileSync(manifest, "utf8")) as { name?: string; version?: string };
      if (name === NAME) return { folder, version: version ?? "unknown" };
    }
    if (folder === dirname(folder)) {
      throw new FewbitError("io/not-found", { path: "package.json", reason: `the package ${NAME} is incomplete` });
    }
  }
}

/** The folder of the model that comes with the package. */
export function bundledModel(): string {
  return join(PACKAGE.folder, "models", BUNDLED_MODEL);
}

/** The held-out text that comes with it. */
export function bundledText(): string {
  return join(PACKAGE.folder, "models", "test.txt");
}

/** The text to calibrate it with: written by the model itself. */
export function bundledCalibrationText(): string {
  return join(PACKAGE.folder, "models", "calibration.txt");
}

/** A path as short as it can be said from here. */
export function shortPath(path: string): string {
  const near = relative(process.cwd(), path);
  return near !== "" && near.length < path.length ? near : path;
}
