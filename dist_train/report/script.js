"use strict";
// Shows values at the pointer, or at the position chosen by the arrow keys. The page is complete without scripts.
for (const svg of document.querySelectorAll("svg[data-kind]")) {
  const chart = svg.closest(".chart");
  const tip = chart.querySelector(".tip");
  const cross = svg.querySelector(".cross");
  const replayed = chart.closest("[data-replay]")?.dataset;
  const isScatter = svg.dataset.kind === "scatter";
  const [left, top, right, bottom] = svg.dataset.frame.split(" ").map(Number);
  const series = [...svg.querySelectorAll(".series")].map((group) => ({
    group,
    label: group.dataset.label,
    style: group.getAttribute("class"),
    points: JSON.parse(group.dataset.points).filter(([x, y]) => !isScatter || (y >= top && y <= bottom)),
  }));
  const visibleSeries = () => series.filter((one) => one.points.length && getComputedStyle(one.group).display !== "none");
  const nearest = (points, distance) => points.reduce((a, b) => (distance(b) < distance(a) ? b : a));
  let chosen = null;

  const hide = () => {
    tip.hidden = true;
    chosen = null;
    svg.classList.remove("pointed");
  };
  const line = (style, text) => {
    const row = document.createElement("div");
    row.className = style;
    const swatch = document.createElement("span");
    swatch.className = "swatch";
    row.append(swatch, text);
    return row;
  };
  const place = (x, y) => {
    const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
    tip.hidden = false;
    const beside = x * scale + 14;
    const fits = beside + tip.offsetWidth <= chart.clientWidth;
    const leftwards = x * scale - tip.offsetWidth - 14;
    const most = Math.max(0, chart.clientWidth - tip.offsetWidth);
    tip.style.left = `${Math.min(most, Math.max(0, fits ? beside : leftwards))}px`;
    tip.style.top = `${svg.getBoundingClientRect().top - chart.getBoundingClientRect().top + y * scale}px`;
  };
  const showLines = (at) => {
    const visible = visibleSeries();
    if (!visible.length) return hide();
    const distance = (point) => Math.abs(point[0] - at);
    const here = nearest(visible.map((one) => nearest(one.points, distance)), distance);
    chosen = here[0];
    const head = document.createElement("b");
    head.textContent = `${svg.dataset.x.split(":")[0].split(", ").pop()} ${here[3]}`;
    const found = visible
      .map((one) => [one, nearest(one.points, (point) => Math.abs(point[0] - here[0]))])
      .filter(([, point]) => Math.abs(point[0] - here[0]) < 2)
      .sort((a, b) => a[1][1] - b[1][1]);
    const rows = found.map(([one, point]) => line(one.style, `${one.label} ${point[2]}`));
    const [update] = found.map(([, point]) => point[4]).filter(Number.isInteger);
    if (replayed && update !== undefined) {
      const again = document.createElement("code");
      again.textContent = `${replayed.replay}${update}`;
      rows.push(again);
    }
    tip.replaceChildren(head, ...rows);
    cross.setAttribute("x1", here[0]);
    cross.setAttribute("x2", here[0]);
    svg.classList.add("pointed");
    place(here[0], bottom + 6);
  };
  const showPoint = (x, y) => {
    const all = visibleSeries().flatMap((one) => one.points.map((point) => ({ one, point })));
    if (!all.length) return hide();
    const distance = ({ point }) => Math.hypot(point[0] - x, point[1] - y);
    const found = nearest(all, distance);
    chosen = all.indexOf(found);
    tip.replaceChildren(line(found.one.style, found.point[2]));
    place(found.point[0], Math.max(0, found.point[1] - 30));
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale;
    const y = (event.clientY - box.top) * scale;
    if (x < left - 8 || x > right + 8) return hide();
    return isScatter ? showPoint(x, y) : showLines(x);
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Escape") return hide();
    if (step === undefined) return undefined;
    event.preventDefault();
    const points = visibleSeries().flatMap((one) => one.points);
    if (!points.length) return undefined;
    const clamp = (index, count) => Math.min(count - 1, Math.max(0, index));
    if (isScatter) {
      const next = points[clamp((chosen ?? -1) + step, points.length)];
      return showPoint(next[0], next[1]);
    }
    const places = [...new Set(points.map((point) => point[0]))].sort((a, b) => a - b);
    return showLines(places[clamp(places.indexOf(chosen) + step, places.length)]);
  });
}
// On paper, open the folded figures and settings; folded commands (.screen) stay closed.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details:not(.screen)")) details.open = true;
});
