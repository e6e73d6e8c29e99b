import type { Page } from "playwright";

// These run in the page, whose globals the project's own types do not have: they are texts.

/** Visible controls without an accessible name, ids that are there twice, and images that are not described. */
export function unnamedControls(page: Page): Promise<string[]> {
  return page.evaluate(`(() => {
    const found = [];
    const seen = (element) => element.checkVisibility();
    for (const element of document.querySelectorAll("a, button, input, select, textarea, [role=gridcell].cell, [role=region], dialog, progress, [role=img]")) {
      if (!seen(element)) continue;
      const labelled = (element.getAttribute("aria-labelledby") || "").split(" ").map((id) => document.getElementById(id)?.textContent ?? "").join("");
      const labels = [...(element.labels ?? [])].map((label) => label.textContent).join("");
      const own = element.matches("a, button") ? element.textContent : "";
      if (!(element.getAttribute("aria-label") || labelled || labels || own).trim()) found.push("no name: " + element.outerHTML.slice(0, 80));
    }
    const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
    for (const id of new Set(ids)) if (ids.filter((other) => other === id).length > 1) found.push("id twice: " + id);
    return found;
  })()`);
}

/** Visible text whose contrast with what is behind it is below WCAG's AA: 4.5, and 3 for large text. */
export function contrast(page: Page): Promise<string[]> {
  return page.evaluate(`(async () => {
    // Colours are read where they come to rest.
    await Promise.all(document.getAnimations().map((animation) => animation.finished));
    const context = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const channels = (layers) => {
      context.clearRect(0, 0, 1, 1);
      for (const layer of layers) { context.fillStyle = layer; context.fillRect(0, 0, 1, 1); }
      return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const luminance = (rgb) => {
      const [r, g, b] = rgb.map((value) => value / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const found = new Set();
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      const element = walker.currentNode.parentElement;
      if (!walker.currentNode.data.trim() || !element.checkVisibility() || element.closest(":disabled, .visually-hidden, option, script")) continue;
      const style = getComputedStyle(element);
      const layers = [];
      for (let at = element; at; at = at.parentElement) layers.unshift(getComputedStyle(at).backgroundColor);
      const behind = channels(["white", ...layers]);
      const [a, b] = [luminance(channels([...layers, style.color])), luminance(behind)];
      const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      const size = Number.parseFloat(style.fontSize);
      const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
      if (ratio < (large ? 3 : 4.5)) found.add(ratio.toFixed(2) + " " + element.className + ": " + walker.currentNode.data.trim().slice(0, 40));
    }
    return [...found];
  })()`);
}
