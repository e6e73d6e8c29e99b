type Child = Node | string | null | false;
type Attributes = Readonly<Record<string, string | number | boolean | null | ((event: Event) => void)>>;

/**
 * An element with attributes and children. A function is a listener (`onclick`); true is an empty attribute; null and false are
 * left out.
 */
export function h<Tag extends keyof HTMLElementTagNameMap>(
  tag: Tag,
  attributes: Attributes = {},
  ...children: readonly Child[]
): HTMLElementTagNameMap[Tag] {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : String(value));
  }
  append(element, children);
  return element;
}

export function fill(element: Element, ...children: readonly Child[]): void {
  element.replaceChildren();
  append(element, children);
}

function append(element: Element, children: readonly Child[]): void {
  for (const child of children) if (child !== null && child !== false) element.append(child);
}

/** Says something to screen readers that is seen elsewhere. */
export function announce(text: string): void {
  const region = document.getElementById("announce");
  if (region !== null) region.textContent = text;
}

/** A term and what it is, for a `dl`. */
export function term(name: string, ...value: readonly Child[]): HTMLElement {
  return h("div", {}, h("dt", {}, name), h("dd", {}, ...value));
}

/** A box with an error in it. Screen readers hear it at once. */
export function errorBox(title: string, error: unknown, ...actions: readonly Child[]): HTMLElement {
  const { message, hint } = error as { message: string; hint?: string };
  return h(
    "div",
    { class: "notice bad", role: "alert" },
    h("strong", {}, title),
    h("p", {}, message),
    hint ? h("p", {}, `What helps: ${hint}.`) : null,
    ...actions,
  );
}

/** A button that is busy while its work runs. */
export function button(label: string, onclick: () => void, attributes: Attributes = {}): HTMLButtonElement {
  return h("button", { type: "button", ...attributes, onclick }, label);
}

export const showBytes = (bytes: number): string => {
  const units = ["B", "KiB", "MiB", "GiB"];
  const power = bytes < 1 ? 0 : Math.min(3, Math.floor(Math.log2(bytes) / 10));
  const value = bytes / 1024 ** power;
  return `${value >= 100 || Number.isInteger(value) ? Math.round(value) : value.toFixed(1)} ${units[power]}`;
};

export const showSeconds = (seconds: number): string =>
  seconds < 1 ? `${(seconds * 1e3).toFixed(1)} ms` : `${seconds.toFixed(1)} s`;
