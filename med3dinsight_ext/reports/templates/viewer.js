const { layers, colors, start } = JSON.parse(document.getElementById("layers").textContent);
const names = ["background", ...colors.map(([name]) => name)];
const view = new niivue.Niivue({
  backColor: [0, 0, 0, 1], isRadiologicalConvention: true, show3Dcrosshair: false,
  crosshairColor: [1, 1, 1, 0.6], crosshairWidth: 0.5, multiplanarForceRender: false,
});

function table() {
  const rgb = colors.map(([, c]) => [1, 3, 5].map((n) => parseInt(c.slice(n, n + 2), 16)));
  const all = [[0, 0, 0], ...rgb];
  return {
    R: all.map((c) => c[0]), G: all.map((c) => c[1]), B: all.map((c) => c[2]),
    A: all.map((_, n) => (n ? 255 : 0)), I: all.map((_, n) => n), labels: names,
  };
}

function place(data) {
  const found = data.values.slice(1).map((value, n) =>
    `${layers[n + 1].name}: ${names[Math.round(value.value)] ?? "none"}`);
  const mm = Array.from(data.mm).slice(0, 3).map((x) => x.toFixed(1)).join(", ");
  document.getElementById("place").textContent = [`${mm} mm`, ...found].join("; ");
  for (const slider of document.querySelectorAll("[data-axis]")) {
    slider.value = Math.round(1000 * view.scene.crosshairPos[Number(slider.dataset.axis)]);
  }
  for (const curve of document.querySelectorAll("[data-curve]")) {
    const x = 300 * view.scene.crosshairPos[Number(curve.dataset.curve)];
    const now = curve.querySelector(".now");
    now.setAttribute("x1", x);
    now.setAttribute("x2", x);
  }
}

async function run() {
  const canvas = document.getElementById("view");
  if (!document.createElement("canvas").getContext("webgl2")) {
    document.getElementById("missing").hidden = false;
    return;
  }
  await view.attachToCanvas(canvas);
  for (const [n, layer] of layers.entries()) {
    const volume = await niivue.NVImage.loadFromBase64({
      base64: layer.data, name: `${n}.nii.gz`, colormap: "gray",
      cal_min: 0, cal_max: 255, opacity: n ? 0.5 : 1,
    });
    if (n) volume.setColormapLabel(table());
    view.addVolume(volume);
  }
  view.setInterpolation(true);
  view.setSliceType(view.sliceTypeMultiplanar);
  view.onLocationChange = place;
  view.drawScene();
  const go = (axis, position) => {
    view.scene.crosshairPos[Number(axis)] = Math.min(Math.max(position, 0), 1);
    view.drawScene();
    view.createOnLocationChange();
  };
  for (const slider of document.querySelectorAll("[data-axis]")) {
    slider.addEventListener("input", () => go(slider.dataset.axis, slider.value / 1000));
  }
  for (const curve of document.querySelectorAll("[data-curve]")) {
    curve.addEventListener("click", (event) => {
      const box = curve.getBoundingClientRect();
      go(curve.dataset.curve, (event.clientX - box.left) / box.width);
    });
  }
  for (const button of document.querySelectorAll("[data-position]")) {
    button.addEventListener("click", () =>
      go(button.dataset.axisTo, Number(button.dataset.position)));
  }
  const opacity = document.getElementById("opacity");
  const boxes = [...document.querySelectorAll("[data-layer]")];
  const show = () => boxes.forEach((box) =>
    view.setOpacity(Number(box.dataset.layer), box.checked ? opacity.value / 100 : 0));
  [opacity, ...boxes].forEach((control) => control?.addEventListener("input", show));
  view.scene.crosshairPos = start;
  view.drawScene();
  view.createOnLocationChange();
  document.body.dataset.ready = "true";
}
run();
