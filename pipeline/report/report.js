"use strict";
(() => {
  const svgName = document.querySelector("svg.chart")?.namespaceURI;
  const make = (name, className, text) => {
    const node = document.createElement(name);
    node.className = className;
    node.textContent = text ?? "";
    return node;
  };
  const place = (mark) => mark.transform.baseVal.consolidate().matrix;

  // Point at a chart: the values of every run at the nearest measured place.
  const tip = make("div", "tip");
  tip.hidden = true;
  document.body.append(tip);

  const lineOf = (series, x) => {
    const nearest = [...series.querySelectorAll(".mark")]
      .reduce((a, b) => (Math.abs(place(a).e - x) <= Math.abs(place(b).e - x) ? a : b));
    return { series, nearest, far: Math.abs(place(nearest).e - x) };
  };

  const show = (svg, event) => {
    const box = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / box.width;
    const pointed = (event.clientX - box.left) * scale;
    const lines = [...svg.querySelectorAll(".series")].map((series) => lineOf(series, pointed));
    if (!lines.length) return;
    const closest = lines.reduce((a, b) => (a.far <= b.far ? a : b)).nearest;
    const x = place(closest).e;
    tip.replaceChildren(make("p", "at", `${closest.dataset.x} ${svg.dataset.xtitle}`));
    for (const { series } of lines) {
      const { nearest, far } = lineOf(series, x);
      if (far > svg.viewBox.baseVal.width / 40) continue;
      const row = make("p", [...series.classList].find((name) => name !== "series"));
      const label = make("span", "", series.dataset.label);
      label.dir = "auto";
      row.append(make("i", ""), label, make("span", "", nearest.dataset.y));
      tip.append(row);
    }
    svg.cross.setAttribute("x1", x);
    svg.cross.setAttribute("x2", x);
    svg.cross.style.visibility = "visible";
    tip.hidden = false;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(8, Math.min(box.left + x / scale + 14, room)) + scrollX}px`;
    tip.style.top = `${Math.max(event.clientY - tip.offsetHeight - 14, 8) + scrollY}px`;
  };

  for (const svg of document.querySelectorAll("svg.chart")) {
    const { width, height } = svg.viewBox.baseVal;
    svg.cross = document.createElementNS(svgName, "line");
    for (const [key, value] of [["class", "cross"], ["y1", 14], ["y2", height - 40]]) {
      svg.cross.setAttribute(key, value);
    }
    svg.cross.style.visibility = "hidden";
    svg.prepend(svg.cross);
    // Above the marks, so that their own titles do not open a second tip.
    const cover = document.createElementNS(svgName, "rect");
    for (const [key, value] of [["width", width], ["height", height], ["fill", "transparent"]]) {
      cover.setAttribute(key, value);
    }
    svg.append(cover);
    const hide = () => {
      tip.hidden = true;
      svg.cross.style.visibility = "hidden";
    };
    svg.addEventListener("pointermove", (event) => show(svg, event));
    svg.addEventListener("pointerdown", (event) => show(svg, event));
    svg.addEventListener("pointerleave", hide);
  }

  // A language's own name beside its code, as the browser knows it, where the page has none.
  for (const heading of document.querySelectorAll("[data-language]:not(:has(.own-name))")) {
    const code = heading.dataset.language.replaceAll("_", "-");
    try {
      const locale = new Intl.Locale(code).minimize();
      const names = new Intl.DisplayNames([locale], { type: "language", fallback: "none" });
      const own = names.of(locale.toString());
      const known = names.resolvedOptions().locale.split("-")[0] === locale.language;
      if (!own || !known) continue;
      const name = make("bdi", "own-name", own);
      name.lang = locale.toString();
      name.dir = "auto";
      heading.append(name);
    } catch {
      continue; // no language tag: the code stands alone
    }
  }
})();
