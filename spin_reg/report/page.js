"use strict";
// Tables: a click on a head sorts by it, a second one the other way round.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    if (!button.textContent) button.textContent = "name";
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => row.cells[i].dataset.v;
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x !== undefined && y !== undefined) return up ? x - y : y - x;
        if (x !== undefined || y !== undefined) return x === undefined ? 1 : -1;  // what is not known stays last
        const order = a.cells[i].textContent.localeCompare(b.cells[i].textContent, "en");
        return up ? order : -order;
      });
      table.tBodies[0].append(...rows);
    });
  });
}
// Drawings: what a place under the pointer holds.
const tip = document.getElementById("tip");
document.addEventListener("pointermove", (event) => {
  const words = event.target.dataset && event.target.dataset.tip;
  tip.hidden = !words;
  if (!words) return;
  tip.textContent = words;
  const { offsetWidth: w, offsetHeight: h } = tip;
  const x = Math.min(event.clientX + 14, innerWidth - w - 8);
  const y = event.clientY + 18 + h > innerHeight ? event.clientY - h - 12 : event.clientY + 18;
  tip.style.transform = `translate(${Math.max(8, x)}px, ${Math.max(8, y)}px)`;
});
document.addEventListener("pointerdown", (event) => event.target.dispatchEvent(new PointerEvent("pointermove", event)));
