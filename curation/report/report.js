// The report page: search and sort the table of labels, and move from label to label by keyboard.
(() => {
  const search = document.getElementById("search");
  const sort = document.getElementById("sort");
  const sections = [...document.querySelectorAll("section.label")];
  let current = -1; // index of the label section last moved to

  if (search) {
    const body = document.querySelector("#index tbody");
    const rows = [...body.rows];
    const by = {
      predicted: (one, other) => other.dataset.predicted - one.dataset.predicted,
      review: (one, other) => other.dataset.review - one.dataset.review,
      precision: (one, other) => one.dataset.precision - other.dataset.precision,
      name: (one, other) => one.dataset.name.localeCompare(other.dataset.name),
    };
    const filter = () => {
      const wanted = search.value.trim().toLowerCase();
      let shown = 0;
      for (const row of rows) shown += !(row.hidden = !row.dataset.name.includes(wanted));
      document.getElementById("nothing").hidden = shown > 0;
    };
    search.addEventListener("input", filter);
    search.addEventListener("keydown", (event) => {
      if (event.key === "Enter") body.querySelector("tr:not([hidden]) a")?.click();
      if (event.key === "Escape") {
        search.value = "";
        filter();
        search.blur();
      }
    });
    sort.addEventListener("change", () => body.append(...rows.sort(by[sort.value])));
  }

  function goTo(index) {
    current = Math.max(0, Math.min(sections.length - 1, index));
    sections[current].focus({ preventScroll: true });
    sections[current].scrollIntoView({ block: "start" });
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select")) return;
    const focused = sections.indexOf(document.activeElement);
    if (focused >= 0) current = focused;
    if (event.key === "j" || event.key === "J") goTo(current + 1);
    else if (event.key === "k" || event.key === "K") goTo(current - 1);
    else if (event.key === "/" && search) {
      event.preventDefault();
      search.focus();
    }
  });
})();
