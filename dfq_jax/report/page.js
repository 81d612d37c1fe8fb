// Sorts rows by what their data attributes say; a second press turns the order.
for (const list of document.querySelectorAll("[data-sortable]")) {
  const rows = [...list.querySelectorAll("[data-order]")];
  const buttons = [...document.querySelectorAll(`[data-sorts="${list.id}"]`)];
  for (const button of buttons) {
    button.addEventListener("click", () => {
      const key = button.dataset.key;
      const turned = button.getAttribute("aria-pressed") === "true" && button.dataset.turned !== "true";
      for (const other of buttons) {
        other.setAttribute("aria-pressed", String(other === button));
        delete other.dataset.turned;
      }
      if (turned) button.dataset.turned = "true";
      const value = (row) => (row.dataset[key] === undefined ? Infinity : Number(row.dataset[key]));
      const sign = (button.dataset.falling === "true") !== turned ? -1 : 1;
      rows.sort((a, b) => sign * (value(a) - value(b)) || a.dataset.order - b.dataset.order);
      rows[0].parentNode.append(...rows);
    });
  }
}
