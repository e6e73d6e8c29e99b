import { readdirSync, readFileSync } from "node:fs";
import { dirname, join, posix, relative, sep } from "node:path";
import { parseSync } from "vite";

/** Files by their path under `src/`, e.g. `core/errors.ts`. */
export type Sources = ReadonlyMap<string, string>;

export interface Import {
  readonly specifier: string;
  /** `type`: erased when compiled; `dynamic`: `import()`; `static`: everything else. */
  readonly kind: "static" | "dynamic" | "type";
}

/** The layers from the bottom up; folders of one row are peers and may use each other. */
const LAYERS: readonly (readonly string[])[] = [
  ["core"],
  ["formats"],
  ["quantize"],
  ["ir"],
  ["plan"],
  ["backends"],
  ["codegen", "runtime"],
  ["io", "models", "text", "validate"],
  ["cli", "index.ts"],
];

/** Those of one row that may not use each other. */
const FORBIDDEN_PEERS: readonly (readonly [from: string, to: string])[] = [
  ["codegen", "runtime"],
  ["runtime", "codegen"],
  ["index.ts", "cli"],
];

const SEAM = "backends/backend.ts";

/** Where `node:` modules may be imported. Everything else runs in a web page, so it reaches these only by `import()`. */
const NODE_ONLY = [/^backends\/native\//, /^backends\/webgpu\/node\.ts$/, /^io\/node\.ts$/, /^cli\//, /^codegen\//];

/** Every npm package that `src` uses, and where. */
const PACKAGES: Readonly<Record<string, RegExp>> = {
  webgpu: /^backends\/webgpu\/node\.ts$/,
  "@huggingface/hub": /^io\//,
  "@huggingface/tokenizers": /^text\//,
  commander: /^cli\//,
  picocolors: /^cli\//,
  vega: /^cli\/accuracy\.ts$/,
  "@huggingface/jinja": /^text\//,
};

/** Reads every TypeScript file under `folder`. */
export function readSources(folder: string): Sources {
  const files = readdirSync(folder, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile() && entry.name.endsWith(".ts"))
    .map((entry) => join(entry.parentPath, entry.name));
  return new Map(
    files.map((file) => [relative(folder, file).split(sep).join("/"), readFileSync(file, "utf8")] as const),
  );
}

/** Every import, re-export, `import()` and `import("…")` type of a file. */
export function importsOf(path: string, code: string): Import[] {
  const { program, errors } = parseSync(path, code);
  if (errors.length > 0) throw new Error(`${path} does not parse: ${errors[0]?.message}`);
  const found: Import[] = [];
  const add = (source: unknown, kind: Import["kind"]) => {
    const specifier = (source as { value?: unknown } | null | undefined)?.value;
    // A computed import() cannot be judged: an empty specifier is never allowed.
    if (source) found.push({ specifier: typeof specifier === "string" ? specifier : "", kind });
  };
  const visit = (node: unknown): void => {
    if (Array.isArray(node)) for (const child of node) visit(child);
    if (typeof node !== "object" || node === null || Array.isArray(node)) return;
    const { type, source, importKind, exportKind, argument, moduleReference } = node as Record<string, unknown>;
    const erased = importKind === "type" || exportKind === "type";
    if (type === "ImportDeclaration" || type === "ExportNamedDeclaration" || type === "ExportAllDeclaration")
      add(source, erased ? "type" : "static");
    else if (type === "ImportExpression") add(source, "dynamic");
    else if (type === "TSImportType") add(source ?? argument, "type");
    else if (type === "TSImportEqualsDeclaration")
      add((moduleReference as { expression?: unknown }).expression, erased ? "type" : "static");
    for (const value of Object.values(node)) visit(value);
  };
  visit(program);
  return found;
}

/** What breaks the rules of `docs/design.md`, one line each: `from -> to: reason`. */
export function violations(sources: Sources): string[] {
  return [...sources].flatMap(([from, code]) =>
    importsOf(from, code).flatMap((entry) => {
      const reason = judge(from, entry, sources);
      return reason ? [`${from} -> ${entry.specifier || "import(…)"}: ${reason}`] : [];
    }),
  );
}

function judge(from: string, { specifier, kind }: Import, sources: Sources): string | null {
  if (specifier.startsWith("node:")) return isNodeOnly(from) ? null : "node: modules are not for web pages";
  if (!specifier.startsWith(".")) return judgePackage(from, specifier);
  const to = resolve(from, specifier, sources);
  if (!to) return "no such file under src";
  if (kind === "static" && isNodeOnly(to) && !isNodeOnly(from)) return `${to} needs Node: use import()`;
  return judgeLayers(from, to, kind) ?? judgeBackends(from, to);
}

function judgePackage(from: string, specifier: string): string | null {
  const name = specifier
    .split("/")
    .slice(0, specifier.startsWith("@") ? 2 : 1)
    .join("/");
  const where = PACKAGES[name];
  if (!where) return "not a package that src uses";
  return where.test(from) ? null : `only ${where.source} uses ${name}`;
}

function judgeLayers(from: string, to: string, kind: Import["kind"]): string | null {
  if (from.startsWith("plan/") && to === SEAM) return kind === "type" ? null : `plan takes only types from ${SEAM}`;
  const [above, below] = [layerOf(from), layerOf(to)];
  const name = (path: string) => path.split("/", 1)[0] as string;
  if (above < 0) return `${name(from)} is in no layer`;
  if (below < 0) return `${name(to)} is in no layer`;
  if (below > above) return `${name(to)} is above ${name(from)}`;
  const peers = FORBIDDEN_PEERS.some(([a, b]) => a === name(from) && b === name(to));
  // runtime and what is above it do not know the generator.
  if (peers || (name(to) === "codegen" && name(from) !== "codegen")) return `${name(from)} may not use ${name(to)}`;
  return null;
}

/** A backend uses itself, what lies beside the seam and what is below; the seam and what lies beside it use no backend. */
function judgeBackends(from: string, to: string): string | null {
  if (!from.startsWith("backends/") || !to.startsWith("backends/")) return null;
  const folder = (path: string) => path.split("/").slice(1, -1).join("/");
  return folder(to) === "" || folder(from).split("/")[0] === folder(to).split("/")[0]
    ? null
    : "backends do not import each other";
}

function layerOf(path: string): number {
  const name = path.split("/", 1)[0] as string;
  return LAYERS.findIndex((row) => row.includes(name));
}

function isNodeOnly(path: string): boolean {
  return NODE_ONLY.some((pattern) => pattern.test(path));
}

function resolve(from: string, specifier: string, sources: Sources): string | null {
  const path = posix.normalize(posix.join(dirname(from), specifier));
  return [path.replace(/\.js$/, ".ts"), path].find((candidate) => sources.has(candidate)) ?? null;
}
