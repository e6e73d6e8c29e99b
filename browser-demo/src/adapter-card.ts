import { call } from "./client.js";
import { button, errorBox, fill, h, showBytes, term } from "./dom.js";
import type { AdapterCard } from "./protocol.js";

/** The features that fewbit's kernels can use, and what it means to go without, in words. */
const COSTS: Readonly<Record<string, { readonly name: string; readonly without: string }>> = {
  subgroups: {
    name: "subgroups",
    without:
      "Tier subgroups falls away. Single tokens reduce their sums through workgroup memory, and the matrix unit cannot be used.",
  },
  "shader-f16": {
    name: "shader-f16",
    without:
      "Tier f16 falls away. Weights stored as float16 still work, because their bits are decoded in float32; the matrix unit cannot be used.",
  },
  "chromium-experimental-subgroup-matrix": {
    name: "subgroup matrix",
    without:
      "The matrix unit (tensor cores) stays idle, so prompts run on ordinary arithmetic. Chromium offers it behind chrome://flags/#enable-unsafe-webgpu.",
  },
  "timestamp-query": {
    name: "timestamp-query",
    without: "The GPU's own time of a step cannot be measured. Times here include the way to the GPU and back.",
  },
};

/** Loads and shows what this browser offers. */
export function adapterCard(): HTMLElement {
  const body = h(
    "div",
    { class: "card-body", "aria-busy": true },
    h("p", { class: "muted" }, "Asking the browser for a GPU …"),
  );
  const section = h(
    "section",
    { class: "card", "aria-labelledby": "adapter-title", id: "adapter" },
    h("h2", { id: "adapter-title" }, "Adapter"),
    body,
  );
  const load = () =>
    call("adapter", null)
      .then(
        (card) => fill(body, ...describe(card)),
        (error: unknown) => fill(body, errorBox("No usable adapter", error, button("Try again", load), advice())),
      )
      .finally(() => body.removeAttribute("aria-busy"));
  load();
  return section;
}

function describe({ name, kind, reason, info, features, limits, missing, tiers }: AdapterCard): HTMLElement[] {
  const known = (value: string | undefined) => value || "not told";
  const used = Object.entries(COSTS);
  return [
    h(
      "div",
      { class: "adapter-head" },
      h(
        "p",
        { class: "adapter-name" },
        name,
        " ",
        h("span", { class: `tag ${kind}` }, kind === "software" ? "runs on the CPU" : kind),
      ),
      h("p", { class: "muted" }, reason),
    ),
    h(
      "dl",
      { class: "facts" },
      term("Vendor", known(info.vendor)),
      term("Architecture", known(info.architecture)),
      term("Device", known(info.device)),
      term(
        "Tiers",
        ...tiers.flatMap(({ tier, absent }) => [
          h(
            "span",
            { class: absent === null ? "chip on" : "chip off", title: absent === null ? "offered" : `no ${absent}` },
            absent === null ? tier : `no ${tier}`,
          ),
          " ",
        ]),
      ),
    ),
    h("h3", {}, "Features that kernels use"),
    h(
      "ul",
      { class: "features" },
      ...used.map(([feature, { name: short, without }]) =>
        features.includes(feature)
          ? h("li", { class: "has" }, mark("✓", "has"), h("span", {}, h("code", {}, short)))
          : h(
              "li",
              { class: "lacks" },
              mark("–", "lacks"),
              h("span", {}, h("code", {}, short), h("span", { class: "cost" }, ` ${without}`)),
            ),
      ),
    ),
    ...cost(missing),
    h(
      "details",
      {},
      h("summary", {}, "Limits, and every feature"),
      h(
        "div",
        { class: "scroll", tabindex: 0, role: "region", "aria-label": "Limits" },
        h(
          "table",
          { class: "plain" },
          h(
            "thead",
            {},
            h(
              "tr",
              {},
              ...["Limit", "This adapter", "Guaranteed by WebGPU"].map((text) => h("th", { scope: "col" }, text)),
            ),
          ),
          h(
            "tbody",
            {},
            ...limits.map((limit) =>
              h(
                "tr",
                {},
                h("th", { scope: "row" }, h("code", {}, limit.name)),
                h("td", {}, showLimit(limit.name, limit.value)),
                h("td", {}, showLimit(limit.name, limit.guaranteed)),
              ),
            ),
          ),
        ),
      ),
      h("p", { class: "wrap" }, ...features.flatMap((feature) => [h("code", {}, feature), " "])),
    ),
  ];
}

/** A sign that is also read. */
const mark = (sign: string, text: string): HTMLElement =>
  h("span", { class: "mark" }, h("span", { "aria-hidden": true }, sign), h("span", { class: "visually-hidden" }, text));

const showLimit = (name: string, value: number): string =>
  /Size$|Storage/.test(name) && !/SizeX|Buffers/.test(name) ? showBytes(value) : value.toLocaleString("en");

function cost(missing: AdapterCard["missing"]): HTMLElement[] {
  const title = h("h3", {}, "What is missing, and what that costs");
  if (missing.length === 0)
    return [title, h("p", {}, "Nothing: the bundled model runs on the same kernels as on a GPU with every feature.")];
  return [
    title,
    h(
      "ul",
      { class: "costs" },
      ...missing.map(({ kernel, instead, reason, steps, slowdown, quantize }) =>
        h(
          "li",
          {},
          h("code", {}, kernel),
          ` falls away (${reason}). ${steps} steps of the bundled model in ${quantize} run on `,
          h("code", {}, instead),
          slowdown < 1.05 ? ", estimated as fast at their size." : `, estimated ${slowdown.toFixed(1)} times slower.`,
        ),
      ),
    ),
  ];
}

/** What to do in a browser without WebGPU. */
export function advice(): HTMLElement {
  return h(
    "div",
    { class: "advice" },
    h("p", {}, "fewbit needs WebGPU. What to try:"),
    h(
      "ul",
      {},
      h(
        "li",
        {},
        "Chrome or Edge 113 and later on Windows, macOS, ChromeOS and Android 12; Safari 26; Firefox 141 on Windows.",
      ),
      h(
        "li",
        {},
        "On Linux start Chrome with ",
        h("code", {}, "--enable-unsafe-webgpu --enable-features=Vulkan"),
        ", or switch it on at ",
        h("code", {}, "chrome://flags/#enable-unsafe-webgpu"),
        ".",
      ),
      h("li", {}, "Open the page by https or from localhost: browsers hide WebGPU from other pages."),
      h(
        "li",
        {},
        "See ",
        h("code", {}, "chrome://gpu"),
        " for a driver that the browser refuses. Without any GPU, ",
        h("code", {}, "--use-webgpu-adapter=swiftshader"),
        " runs on the CPU.",
      ),
      h("li", {}, "In Node nothing of this is needed: ", h("code", {}, "npx fewbit validate"), "."),
    ),
  );
}
