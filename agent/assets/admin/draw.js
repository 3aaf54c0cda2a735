// Where services stand in the drawing, and how lines run between them: in layers from
// callers to the called, the same for the same services. No data becomes markup here:
// names are attributes and text of elements that are made one by one.
"use strict";

const NODE = { width: 150, height: 46 };
const GAP = { x: 230, y: 26 };
const TRANSPORTS = {
  hbone: "Encrypted (mTLS)",
  local: "Local",
  plaintext: "Plaintext",
  probe: "Probe",
  bypass: "Past the agent",
};
// In the drawing there is little room.
const SHORT = { hbone: "mTLS", local: "local", plaintext: "plaintext", probe: "probe", bypass: "past" };
/** Lines that are drawn at most, the busiest first; the table has all. */
const MOST_LINES = 80;
/** With more lines than this only those that touch a chosen service say what they are. */
const MOST_LABELS = 24;

function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) {
    element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

/** The layer of every node: one more than the deepest of its callers, leaving out what
 * would close a circle. */
function layers(ids, edges) {
  const callees = new Map(ids.map((id) => [id, []]));
  for (const edge of edges) {
    callees.get(edge.source).push(edge.destination);
  }
  const called = new Set(edges.filter((e) => e.source !== e.destination).map((e) => e.destination));
  const layer = new Map();
  const order = [];
  const state = new Map();
  const forward = [];
  // Depth first, without recursion: a chain may be long.
  for (const root of [...ids.filter((id) => !called.has(id)), ...ids]) {
    const stack = [[root, 0]];
    if (state.has(root)) {
      continue;
    }
    state.set(root, "open");
    while (stack.length) {
      const top = stack[stack.length - 1];
      const next = callees.get(top[0])[top[1]++];
      if (next === undefined) {
        state.set(top[0], "done");
        order.unshift(top[0]);
        stack.pop();
      } else if (!state.has(next)) {
        state.set(next, "open");
        forward.push([top[0], next]);
        stack.push([next, 0]);
      } else if (state.get(next) === "done") {
        forward.push([top[0], next]);
      }
    }
  }
  const from = new Map(ids.map((id) => [id, []]));
  for (const [source, destination] of forward) {
    from.get(source).push(destination);
  }
  for (const id of order) {
    layer.set(id, layer.get(id) ?? 0);
    for (const next of from.get(id)) {
      layer.set(next, Math.max(layer.get(next) ?? 0, layer.get(id) + 1));
    }
  }
  return layer;
}

/** Positions of nodes, and the points that each edge passes. */
function layout(nodes, edges) {
  const ids = nodes.map((node) => node.id);
  const layer = layers(ids, edges);
  const rows = [];
  const put = (id, at) => {
    (rows[at] ??= []).push(id);
  };
  ids.forEach((id) => put(id, layer.get(id)));
  // A line over several layers gets a place of its own in each.
  const links = [];
  const ways = edges.map((edge, index) => {
    const [start, end] = [layer.get(edge.source), layer.get(edge.destination)];
    const step = Math.sign(end - start);
    const way = [edge.source];
    for (let at = start + step; step && at !== end; at += step) {
      const place = `\n${index} ${at}`;
      put(place, at);
      way.push(place);
    }
    way.push(edge.destination);
    for (let i = 1; i < way.length; i++) {
      links.push([way[i - 1], way[i]]);
    }
    return way;
  });
  const depth = new Map();
  rows.forEach((row, at) => row.forEach((id) => depth.set(id, at)));
  const beside = new Map([...depth.keys()].map((id) => [id, []]));
  for (const [a, b] of links) {
    if (Math.abs(depth.get(a) - depth.get(b)) === 1) {
      beside.get(a).push(b);
      beside.get(b).push(a);
    }
  }
  const index = new Map();
  const number = (row) => row.forEach((id, i) => index.set(id, i - (row.length - 1) / 2));
  rows.forEach(number);
  for (let round = 0; round < 8; round++) {
    const down = round % 2 === 0;
    const turn = down ? rows : [...rows].reverse();
    for (const row of turn) {
      const weight = new Map(
        row.map((id) => {
          const at = depth.get(id) + (down ? -1 : 1);
          const near = beside.get(id).filter((other) => depth.get(other) === at);
          const sum = near.reduce((total, other) => total + index.get(other), 0);
          return [id, near.length ? sum / near.length : index.get(id)];
        }),
      );
      row.sort((a, b) => weight.get(a) - weight.get(b) || index.get(a) - index.get(b));
      number(row);
    }
  }
  const tallest = Math.max(1, ...rows.map((row) => row.length));
  const height = tallest * (NODE.height + GAP.y) + 20;
  const width = Math.max(1, rows.length) * (NODE.width + GAP.x) - GAP.x + 20;
  const position = new Map();
  for (const [id, at] of depth) {
    position.set(id, {
      x: 10 + NODE.width / 2 + at * (NODE.width + GAP.x),
      y: height / 2 + index.get(id) * (NODE.height + GAP.y),
    });
  }
  return { width, height, position, ways };
}

/** A smooth line through points, and where its label stands. */
function curve(points, shift) {
  const first = points[0];
  const last = points[points.length - 1];
  const half = NODE.width / 2;
  if (first === last) {
    const [x, y] = [first.x + half - 26, first.y - NODE.height / 2];
    return { d: `M${x} ${y}c-4 -24 40 -24 32 4`, label: { x: x + 14, y: y - 18 } };
  }
  if (first.x === last.x) {
    // Within a layer: around on the right.
    const x = first.x + half;
    const out = x + 50 + Math.abs(first.y - last.y) / 6;
    const [y1, y2] = [first.y + shift, last.y + shift];
    return { d: `M${x} ${y1}C${out} ${y1} ${out} ${y2} ${x + 5} ${y2}`, label: { x: (x + out * 3) / 4, y: (y1 + y2) / 2 } };
  }
  const way = Math.sign(last.x - first.x);
  const through = points.map((point, i) => {
    const side = i === 0 ? half * way : i === points.length - 1 ? -(half + 5) * way : 0;
    return { x: point.x + side, y: point.y + shift };
  });
  let d = `M${through[0].x} ${through[0].y}`;
  for (let i = 1; i < through.length; i++) {
    const [a, b] = [through[i - 1], through[i]];
    const middle = (a.x + b.x) / 2;
    d += `C${middle} ${a.y} ${middle} ${b.y} ${b.x} ${b.y}`;
  }
  // Nearer to its end, where lines that begin together are apart.
  const [a, b] = [through[through.length - 2], through[through.length - 1]];
  return { d, label: { x: a.x + (b.x - a.x) * 0.5, y: a.y + (b.y - a.y) * 0.5 } };
}

function caption(edge) {
  const parts = [SHORT[edge.transport] ?? edge.transport];
  if (edge.rate > 0) {
    parts.push(`${rate(edge.rate)}/s`);
  }
  if (edge.denied > 0) {
    parts.push(`✕ ${count(edge.denied)} denied`);
  }
  if (edge.errors > 0) {
    parts.push(`! ${count(edge.errors)} failed`);
  }
  return parts.join(" · ");
}

/** Text that fits into so many characters. */
function short(text, most) {
  const all = [...text];
  return all.length > most ? all.slice(0, most - 1).join("") + "…" : text;
}

/** Draws into `target`. `chosen` is a node's id or null, `choose` is told of a click. */
function draw(target, nodes, edges, chosen, choose) {
  const busy = [...edges].sort((a, b) => b.rate - a.rate || b.denied - a.denied || b.connections - a.connections);
  const drawn = busy.slice(0, MOST_LINES).sort((a, b) => (a.source + "\n" + a.destination < b.source + "\n" + b.destination ? -1 : 1));
  const ids = new Set(drawn.flatMap((edge) => [edge.source, edge.destination]));
  const shown = nodes.filter((node) => ids.has(node.id));
  const { width, height, position, ways } = layout(shown, drawn);
  target.setAttribute("viewBox", `0 0 ${width} ${height}`);
  target.setAttribute("width", width);
  target.setAttribute("height", height);
  const touches = (edge) => chosen === null || edge.source === chosen || edge.destination === chosen;
  const [lines, labels, boxes] = [svg("g", { "aria-hidden": "true" }), svg("g", { "aria-hidden": "true" }), svg("g")];
  const siblings = new Map();
  const pair = (edge) => [edge.source, edge.destination].sort().join("\n");
  drawn.forEach((edge) => siblings.set(pair(edge), (siblings.get(pair(edge)) ?? 0) + 1));
  const used = new Map();
  drawn.forEach((edge, i) => {
    const nth = used.get(pair(edge)) ?? 0;
    used.set(pair(edge), nth + 1);
    const shift = (nth - (siblings.get(pair(edge)) - 1) / 2) * 18;
    const { d, label } = curve(ways[i].map((id) => position.get(id)), shift);
    const look = `${edge.transport} ${edge.verdict === "deny" ? "deny" : ""} ${touches(edge) ? "" : "aside"}`;
    lines.append(svg("path", { class: `line ${look}`, d, "marker-end": `url(#head-${edge.verdict === "deny" ? "deny" : edge.transport})` }));
    if (touches(edge) && (chosen !== null || drawn.length <= MOST_LABELS)) {
      const text = svg("text", { x: label.x, y: label.y + 4, "text-anchor": "middle" }, caption(edge));
      const wide = caption(edge).length * 5.9 + 8;
      const box = svg("rect", { x: label.x - wide / 2, y: label.y - 8, width: wide, height: 16, rx: 4 });
      labels.append(svg("g", { class: `label ${edge.denied ? "deny" : ""}` }, box, text));
    }
  });
  const near = new Set(drawn.filter(touches).flatMap((edge) => [edge.source, edge.destination]));
  const inOrder = [...shown].sort((a, b) => {
    const [p, q] = [position.get(a.id), position.get(b.id)];
    return p.x - q.x || p.y - q.y;
  });
  const entry = inOrder.some((node) => node.id === chosen) ? chosen : inOrder[0]?.id;
  for (const node of inOrder) {
    const { x, y } = position.get(node.id);
    const place = { workload: node.here ? "on this node" : "elsewhere", node: "this machine", outside: "outside of the mesh" }[node.kind];
    const name = short(node.kind === "node" ? "Node" : node.name, 19);
    const about = short(node.namespace ? `${node.namespace} · ${place}` : place, 24);
    const title = svg("text", { x, y: y - 2, "text-anchor": "middle" }, name);
    const under = svg("text", { class: "under", x, y: y + 14, "text-anchor": "middle" }, about);
    const rect = svg("rect", { x: x - NODE.width / 2, y: y - NODE.height / 2, width: NODE.width, height: NODE.height, rx: 8 });
    const calls = drawn.filter((edge) => edge.source === node.id).length;
    const called = drawn.filter((edge) => edge.destination === node.id).length;
    const box = svg(
      "g",
      {
        class: `node ${node.kind} ${node.here ? "here" : ""} ${near.has(node.id) ? "" : "aside"}`,
        role: "button",
        tabindex: node.id === entry ? "0" : "-1",
        "aria-pressed": String(node.id === chosen),
        // What is seen comes first, so that it can be said to the machine (WCAG 2.5.3).
        "aria-label": `${name} ${about}; ${node.id}; calls ${calls}, called by ${called}`,
      },
      rect,
      title,
      " ",
      under,
    );
    box.dataset.id = node.id;
    box.addEventListener("click", () => choose(node.id));
    boxes.append(box);
  }
  const heads = svg("defs");
  for (const kind of [...Object.keys(TRANSPORTS), "deny"]) {
    const shape = svg("path", { class: `head ${kind}`, d: "M0 0L8 4L0 8z" });
    heads.append(svg("marker", { id: `head-${kind}`, viewBox: "0 0 8 8", refX: 4, refY: 4, markerWidth: 9, markerHeight: 9, markerUnits: "userSpaceOnUse", orient: "auto" }, shape));
  }
  const had = target.contains(document.activeElement) ? document.activeElement.dataset?.id : undefined;
  target.replaceChildren(heads, lines, boxes, labels);
  if (had !== undefined) {
    focusNode(target, had);
  }
  return { left: edges.length - drawn.length };
}

function focusNode(target, id) {
  const all = [...target.querySelectorAll(".node")];
  const next = all.find((node) => node.dataset.id === id) ?? all[0];
  all.forEach((node) => node.setAttribute("tabindex", node === next ? "0" : "-1"));
  next?.focus();
}

/** Arrow keys go to the nearest service that way; Enter and the space bar choose. */
function keys(target, choose) {
  target.addEventListener("keydown", (event) => {
    const node = event.target.closest?.(".node");
    const ways = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
    if (!node) {
      return;
    }
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      choose(node.dataset.id);
    } else if (ways[event.key]) {
      event.preventDefault();
      const [dx, dy] = ways[event.key];
      const at = (element) => {
        const box = element.querySelector("rect");
        return [Number(box.getAttribute("x")), Number(box.getAttribute("y"))];
      };
      const [x, y] = at(node);
      const candidates = [...target.querySelectorAll(".node")]
        .map((other) => ({ other, along: (at(other)[0] - x) * dx + (at(other)[1] - y) * dy, across: Math.abs((at(other)[0] - x) * dy) + Math.abs((at(other)[1] - y) * dx) }))
        .filter((candidate) => candidate.along > 0)
        .sort((a, b) => a.along + 2 * a.across - (b.along + 2 * b.across));
      if (candidates.length) {
        focusNode(target, candidates[0].other.dataset.id);
      }
    }
  });
}

function count(number) {
  return Number(number).toLocaleString("en");
}

function rate(number) {
  return number >= 10 ? count(Math.round(number)) : number >= 0.1 ? number.toFixed(1) : number.toFixed(2);
}
