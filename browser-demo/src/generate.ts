import { barChart } from "./charts.js";
import { call, WorkerFailure } from "./client.js";
import { announce, button, errorBox, fill, h, showBytes, showSeconds, term } from "./dom.js";
import type { GenerateArguments, GenerateNotice, Speed } from "./protocol.js";

type Difference = Extract<GenerateNotice, { kind: "difference" }>;

/** The page that generates text in any format and compares its logits with the reference's. */
export function generatePage(): HTMLElement {
  const names = h("datalist", { id: "names" });
  const quantize = h("input", {
    id: "quantize",
    list: "names",
    value: "int4wo-64",
    required: true,
    autocomplete: "off",
    spellcheck: false,
  });
  const prompt = h("textarea", { id: "prompt", rows: 3, required: true }, "It was a dark night");
  const maxTokens = number("max-tokens", 48, 1, 512, 1);
  const temperature = number("temperature", 0, 0, 2, 0.1);
  const seed = number("seed", 0, 0, 2 ** 32 - 1, 1);
  const compare = h("input", { id: "compare-reference", type: "checkbox", checked: true });
  const start = h("button", { type: "submit", class: "primary", id: "generate" }, "Generate");
  let abort: AbortController | null = null;
  const cancel = button("Cancel", () => abort?.abort(), { id: "generate-cancel", disabled: true });
  const progress = h("progress", { max: 1, value: 0, "aria-label": "Progress" });
  const status = h("p", { class: "status", id: "generate-status" }, "Nothing has run yet.");
  const notices = h("div", { class: "notices" });
  const output = h("div", { class: "text", id: "text", tabindex: 0, role: "region", "aria-label": "Generated text" });
  const facts = h("dl", { class: "facts", id: "speed" });
  const differences = h("div", { id: "differences" });

  call("names", null).then((list) => fill(names, ...list.map((value) => h("option", { value }))));

  const form = h(
    "form",
    { class: "controls form" },
    h("div", { class: "field wide" }, h("label", { for: "prompt" }, "Prompt"), prompt),
    h(
      "div",
      { class: "field" },
      h("label", { for: "quantize" }, "Format"),
      quantize,
      names,
      h("p", { class: "muted hint" }, "Any name of ", h("code", {}, "--quantize"), ": int8wo, mxfp4, nvfp4wo, none …"),
    ),
    field("Tokens", maxTokens),
    field("Temperature", temperature),
    field("Seed", seed),
    h(
      "div",
      { class: "field check" },
      compare,
      h("label", { for: "compare-reference" }, "Compare every position with the reference"),
    ),
    h("div", { class: "buttons" }, start, cancel),
  );

  const run = async () => {
    const args: GenerateArguments = {
      quantize: quantize.value.trim(),
      prompt: prompt.value,
      maxTokens: maxTokens.valueAsNumber,
      temperature: temperature.valueAsNumber,
      seed: seed.valueAsNumber,
      compare: compare.checked,
    };
    abort = new AbortController();
    [start.disabled, cancel.disabled] = [true, false];
    const found: Difference[] = [];
    const made = h("span", { class: "made" });
    fill(notices);
    fill(facts);
    fill(differences);
    fill(output, h("span", { class: "given" }, args.prompt), made);
    const show = (text: string, done: number, total: number) => {
      status.textContent = text;
      progress.max = Math.max(total, 1);
      progress.value = done;
    };
    show("Starting …", 0, 1);
    let count = 0;
    const notice = (event: GenerateNotice) => {
      if (event.kind === "stage") show(`${event.text} …`, event.done, event.total);
      else if (event.kind === "token") {
        made.append(event.text);
        show(`Token ${++count} of at most ${args.maxTokens}`, count, args.maxTokens);
      } else if (event.kind === "speed") fill(facts, ...speedFacts(event.speed));
      else {
        found.push(event);
        show(`Comparing position ${found.length} of ${count}`, found.length, count);
      }
    };
    let outcome = "Finished";
    try {
      await call("generate", args, { signal: abort.signal, notice });
    } catch (error) {
      const code = error instanceof WorkerFailure ? error.code : "";
      outcome = code === "operation/aborted" ? "Cancelled" : code === "device/lost" ? "Device lost" : "Stopped";
      if (code !== "operation/aborted")
        notices.append(
          errorBox(
            code === "device/lost" ? "The GPU device was lost" : "Nothing was generated",
            error,
            button("Try again on a new device", () => void run()),
          ),
        );
    }
    if (found.length > 0) fill(differences, ...showDifferences(found));
    abort = null;
    [start.disabled, cancel.disabled] = [false, true];
    status.textContent = `${outcome}: ${count} tokens${found.length > 0 ? `, ${found.length} positions compared` : ""}.`;
    announce(status.textContent);
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (abort === null) void run();
  });

  return h(
    "section",
    { class: "card", "aria-labelledby": "generate-title", id: "generation" },
    h("h1", { id: "generate-title" }, "Generate text"),
    h(
      "p",
      { class: "lead" },
      "Runs the bundled model (8 layers, trained on old English texts) in the worker, in any number format. The reference then computes the same positions in float64 on the CPU.",
    ),
    form,
    h("div", { class: "run" }, progress, status),
    notices,
    output,
    facts,
    differences,
  );
}

function speedFacts({ promptTokens, promptSeconds, tokens, decodeSeconds, weightBytes }: Speed): HTMLElement[] {
  const rate = (count: number, seconds: number) =>
    seconds > 0 && count > 0 ? `${(count / seconds).toFixed(1)} tokens/s` : "–";
  // The prompt's run gives the first token.
  return [
    term("Decoding", h("strong", {}, rate(tokens - 1, decodeSeconds))),
    term("Prompt", `${rate(promptTokens, promptSeconds)} (${promptTokens} tokens in ${showSeconds(promptSeconds)})`),
    term("Weights", showBytes(weightBytes)),
  ];
}

function showDifferences(found: readonly Difference[]): HTMLElement[] {
  const worst = found.map(({ difference }) => difference.worst);
  const most = Math.max(...worst);
  const agreed = found.filter(({ difference: { best } }) => best[0] === best[1]).length;
  const summary = `largest ${most.toExponential(2)} over ${found.length} positions, the most likely token agrees at ${agreed}`;
  return [
    h("h2", {}, "Logits against the reference"),
    h("p", {}, `The ${summary}.`),
    barChart({
      label: `Largest logit difference by position: ${summary}`,
      x: found.map(({ difference }) => difference.position),
      y: worst,
      xLabel: "position",
      yLabel: "largest |Δ logit|",
    }),
    h(
      "details",
      {},
      h("summary", {}, "Every position"),
      h(
        "div",
        { class: "scroll", tabindex: 0, role: "region", "aria-label": "Every position" },
        h(
          "table",
          { class: "plain" },
          h(
            "thead",
            {},
            h(
              "tr",
              {},
              ...["Position", "Token", "Largest |Δ logit|", "Largest |logit|", "Same best token"].map((text) =>
                h("th", { scope: "col" }, text),
              ),
            ),
          ),
          h(
            "tbody",
            {},
            ...found.map(({ difference, token }) =>
              h(
                "tr",
                {},
                h("td", {}, String(difference.position)),
                h("td", {}, h("code", {}, JSON.stringify(token))),
                h("td", {}, difference.worst.toExponential(2)),
                h("td", {}, difference.range.toFixed(2)),
                h("td", {}, difference.best[0] === difference.best[1] ? "yes" : "no"),
              ),
            ),
          ),
        ),
      ),
    ),
  ];
}

function number(id: string, value: number, min: number, max: number, step: number): HTMLInputElement {
  return h("input", { id, type: "number", value, min, max, step, required: true });
}

function field(label: string, control: HTMLElement): HTMLElement {
  return h("div", { class: "field" }, h("label", { for: control.id }, label), control);
}
