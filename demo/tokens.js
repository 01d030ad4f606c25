// Hover, click or arrow keys on the drawing of a picture's tokens: says what became of the token under the pointer.
// Runs inside a gr.HTML component, whose `element` outlives the figures that are drawn into it.

const SVG = "http://www.w3.org/2000/svg";
let figure = null; // the figure that `data` was read from
let data = null;
let current = null; // token number
let pinned = false;

function read(target) {
  const found = target.closest && target.closest(".fv-figure");
  if (!found) return false;
  if (found !== figure) {
    figure = found;
    data = JSON.parse(found.dataset.tokens);
    current = null;
    pinned = false;
  }
  return true;
}

function at(event) {
  const box = figure.querySelector("img").getBoundingClientRect();
  const x = ((event.clientX - box.left) / box.width) * data.size[0];
  const y = ((event.clientY - box.top) / box.height) * data.size[1];
  for (const p of data.panels) {
    const col = Math.floor((x - p.x) / p.cell);
    const row = Math.floor((y - p.y) / p.cell);
    if (col >= 0 && row >= 0 && col < p.cols && row < p.rows) return p.first + row * p.cols + col;
  }
  return null;
}

function place(token) {
  for (const p of data.panels) {
    const i = token - p.first;
    if (i >= 0 && i < p.rows * p.cols) return { panel: p, row: Math.floor(i / p.cols), col: i % p.cols };
  }
  return null;
}

function group(token) {
  if (!data.owner || data.owner[token] < 0) return [token];
  const owner = data.owner[token];
  return data.owner.flatMap((o, i) => (o === owner ? [i] : []));
}

function short(list) {
  return list.length > 8 ? list.slice(0, 8).join(", ") + " and " + (list.length - 8) + " more" : list.join(", ");
}

function sentence(token) {
  const { panel, row, col } = place(token);
  const parts = ["Token " + token, (panel.title ? panel.title + ", " : "") + "row " + row + ", column " + col];
  const left = data.left[token];
  const here = data.layer;
  const goes = left > here ? ", leaves in front of decoder layer " + left : "";
  if (left >= 0 && left <= here)
    parts.push(left === 0 ? "dropped where the sequence enters the decoder" : "dropped in front of decoder layer " + left);
  else parts.push((data.markers.includes(token) ? "kept as a position marker" : "kept") + goes);
  if (data.scores && data.scores[token] !== null) parts.push("score " + Number(data.scores[token].toPrecision(3)));
  if (data.owner) {
    const members = group(token).filter((t) => t !== token);
    if (data.owner[token] === token) {
      if (members.length) parts.push("speaks for " + members.length + (members.length > 1 ? " others: " : " other: ") + short(members));
    } else if (data.owner[token] >= 0) parts.push("merged into token " + data.owner[token]);
    else parts.push("no other token speaks for it");
  }
  return parts.join(" · ");
}

function outline(svg, token, kind) {
  const { panel, row, col } = place(token);
  for (const ring of [kind + " under", kind]) {
    const rect = document.createElementNS(SVG, "rect");
    rect.setAttribute("x", panel.x + col * panel.cell);
    rect.setAttribute("y", panel.y + row * panel.cell);
    rect.setAttribute("width", panel.cell);
    rect.setAttribute("height", panel.cell);
    rect.setAttribute("class", ring);
    svg.append(rect);
  }
}

function show(token) {
  if (token === current) return;
  current = token;
  const svg = figure.querySelector("svg");
  const line = figure.querySelector(".fv-token");
  svg.replaceChildren();
  if (token === null) {
    line.textContent = line.dataset.hint;
    return;
  }
  for (const member of group(token)) if (member !== token) outline(svg, member, "member");
  outline(svg, token, "chosen");
  line.textContent = sentence(token);
}

element.addEventListener("pointermove", (event) => {
  if (event.target.closest(".fv-stage") && read(event.target) && !pinned) show(at(event));
});
element.addEventListener("pointerout", (event) => {
  if (event.target.closest(".fv-stage") && read(event.target) && !pinned && !figure.contains(event.relatedTarget)) show(null);
});
element.addEventListener("click", (event) => {
  if (!event.target.closest(".fv-stage") || !read(event.target)) return;
  const token = at(event);
  pinned = token !== null && !(pinned && token === current);
  show(token);
});
element.addEventListener("keydown", (event) => {
  if (!event.target.closest(".fv-stage") || !read(event.target)) return;
  if (event.key === "Escape") {
    pinned = false;
    show(null);
    return;
  }
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  if (!step) return;
  event.preventDefault();
  pinned = true;
  if (current === null) return show(data.panels[0].first);
  const { panel, row, col } = place(current);
  const r = row + step[0];
  const c = col + step[1];
  if (r >= 0 && r < panel.rows && c >= 0 && c < panel.cols) return show(panel.first + r * panel.cols + c);
  const next = data.panels[data.panels.indexOf(panel) + (step[0] + step[1])]; // over the edge: into the neighbouring panel
  if (next) show(step[0] + step[1] > 0 ? next.first : next.first + next.rows * next.cols - 1);
});
