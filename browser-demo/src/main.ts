import "uplot/dist/uPlot.min.css";
import "./style/base.css";
import "./style/controls.css";
import "./style/tables.css";
import "./style/detail.css";
import { adapterCard, advice } from "./adapter-card.js";
import { comparePage } from "./compare.js";
import { fill, h } from "./dom.js";
import { generatePage } from "./generate.js";
import { validatePage } from "./validate.js";

const PAGES = [
  { hash: "#validate", name: "Validate", make: () => [validatePage(), adapterCard()] },
  { hash: "#generate", name: "Generate", make: () => [generatePage()] },
  { hash: "#compare", name: "Compare", make: () => [comparePage()] },
] as const;

/** Pages are made when they are first shown, and kept: a run goes on while another page is looked at. */
function start(main: HTMLElement, nav: HTMLElement): void {
  const made = new Map<string, HTMLElement>();
  const links = PAGES.map(({ hash, name }) => h("a", { href: hash }, name));
  nav.append(...links);
  const show = () => {
    if (location.hash === "#content") return;
    const page = PAGES.find(({ hash }) => hash === location.hash) ?? PAGES[0];
    for (const [i, { hash }] of PAGES.entries()) {
      if (hash === page.hash) links[i]?.setAttribute("aria-current", "page");
      else links[i]?.removeAttribute("aria-current");
    }
    let content = made.get(page.hash);
    if (content === undefined) {
      content = h("div", { class: "page" }, ...page.make());
      made.set(page.hash, content);
      main.append(content);
    }
    for (const [hash, element] of made) element.hidden = hash !== page.hash;
    document.title = `fewbit: ${page.name.toLowerCase()}`;
  };
  addEventListener("hashchange", show);
  show();
}

const main = document.querySelector("main") as HTMLElement;
if ("gpu" in navigator) start(main, document.querySelector("nav") as HTMLElement);
else {
  const title = h("h1", {}, "This page has no WebGPU");
  fill(main, h("div", { class: "page" }, h("section", { class: "card", id: "no-webgpu" }, title, advice())));
}
