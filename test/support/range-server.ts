import { createHash } from "node:crypto";
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";

/** A server of ranges of `files`, and of what is used of the Hub's API for the repository `o/m`. */
export class RangeServer {
  files = new Map<string, Uint8Array>();
  /** Bytes of bodies that go out before connections are cut, and those that went. */
  budget = Number.POSITIVE_INFINITY;
  sent = 0;
  /** What was asked for. */
  paths: string[] = [];
  readonly #server: Server = createServer((request, response) => this.#serve(request, response));

  /** Where it is, once it is `started`. */
  get base(): URL {
    return new URL(`http://127.0.0.1:${(this.#server.address() as AddressInfo).port}/`);
  }

  async start(): Promise<void> {
    await new Promise<void>((resolve) => this.#server.listen(0, "127.0.0.1", resolve));
  }

  /** As it was, with other files. */
  reset(files: ReadonlyMap<string, Uint8Array>): void {
    [this.files, this.budget, this.sent, this.paths] = [new Map(files), Number.POSITIVE_INFINITY, 0, []];
  }

  close(): void {
    this.#server.closeAllConnections();
    this.#server.close();
  }

  #serve(request: IncomingMessage, response: ServerResponse): void {
    const path = new URL(request.url ?? "/", "http://x").pathname;
    this.paths.push(path);
    if (path.startsWith("/api/")) {
      this.#hub(path, request, response);
      return;
    }
    const data = this.files.get(path.slice(1)) ?? this.files.get(path.replace(/^\/o\/m\/resolve\/[0-9a-f]+\//, ""));
    if (data === undefined) return void response.writeHead(404).end();
    const [first = 0, last = 0] = (/bytes=(\d+)-(\d+)/.exec(request.headers.range ?? "") ?? []).slice(1).map(Number);
    const body = data.subarray(first, last + 1);
    response.writeHead(206, { "Content-Range": `bytes ${first}-${last}/${data.length}`, ETag: '"1"' });
    const most = Math.max(0, this.budget - this.sent);
    this.sent += Math.min(most, body.length);
    if (most >= body.length) return void response.end(body);
    response.write(body.subarray(0, most), () => response.destroy());
  }

  #hub(path: string, request: IncomingMessage, response: ServerResponse): void {
    const json = (value: unknown) =>
      response.writeHead(200, { "Content-Type": "application/json" }).end(JSON.stringify(value));
    if (request.headers.authorization !== "Bearer hf_secret") return void response.writeHead(401).end();
    if (path.startsWith("/api/models/o/m/paths-info/")) {
      let text = "";
      request.on("data", (piece) => {
        text += piece;
      });
      request.on("end", () => {
        const wanted = (JSON.parse(text) as { paths: string[] }).paths.filter((file) => this.files.has(file));
        json(
          wanted.map((file) => {
            const data = this.files.get(file) as Uint8Array;
            const oid = createHash("sha256").update(data).digest("hex");
            return {
              type: "file",
              path: file,
              size: data.length,
              oid: "0",
              ...(file.endsWith(".json") ? {} : { lfs: { oid, size: data.length, pointerSize: 1 } }),
            };
          }),
        );
      });
      return;
    }
    if (path === "/api/models/o/m/revision/v1")
      return void json({
        _id: "1",
        id: "o/m",
        private: false,
        gated: false,
        downloads: 0,
        likes: 0,
        lastModified: "2026-01-01T00:00:00Z",
        sha: "c0ffee".padEnd(40, "0"),
      });
    response.writeHead(404).end();
  }
}
