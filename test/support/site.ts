import { readFile } from "node:fs/promises";
import { createServer, type Server } from "node:http";
import type { AddressInfo } from "node:net";
import { extname, join, normalize, sep } from "node:path";

const TYPES: Readonly<Record<string, string>> = {
  ".html": "text/html; charset=utf-8",
  ".js": "text/javascript",
  ".css": "text/css",
  ".json": "application/json",
  ".svg": "image/svg+xml",
};

/** The plainest static host: whole files, no ranges, no rewriting, everything under one path. */
export class Site implements AsyncDisposable {
  readonly url: string;
  readonly #server: Server;

  private constructor(server: Server, path: string) {
    this.#server = server;
    this.url = `http://127.0.0.1:${(server.address() as AddressInfo).port}${path}`;
  }

  /** Serves `folder` under `path`, which begins and ends with a slash. */
  static async serve(folder: string, path: string): Promise<Site> {
    const server = createServer(async (request, response) => {
      const { pathname } = new URL(request.url ?? "/", "http://localhost");
      const rest = pathname.startsWith(path) ? pathname.slice(path.length) || "index.html" : null;
      const file = rest === null ? null : normalize(join(folder, decodeURIComponent(rest)));
      const bytes = file?.startsWith(folder + sep) ? await readFile(file).catch(() => null) : null;
      response.writeHead(bytes === null ? 404 : 200, {
        "Content-Type": TYPES[extname(rest ?? "")] ?? "application/octet-stream",
      });
      response.end(bytes);
    });
    await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
    return new Site(server, path);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#server.closeAllConnections();
    await new Promise((resolve) => this.#server.close(resolve));
  }
}
