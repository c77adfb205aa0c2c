// Opens the viewers of a report where the reader asks for them. Everything comes from the page itself.
"use strict";
(() => {
  const decode = (node) => Uint8Array.from(atob(node.textContent.trim()), (letter) => letter.charCodeAt(0));
  let library;

  // The library is kept compressed, and becomes a script when the first viewer is opened.
  const load = async () => {
    const packed = new Blob([decode(document.getElementById("viewer-library"))]);
    const text = await new Response(packed.stream().pipeThrough(new DecompressionStream("gzip"))).blob();
    const script = document.createElement("script");
    script.src = URL.createObjectURL(new Blob([text], { type: "text/javascript" }));
    const done = new Promise((resolve, reject) => Object.assign(script, { onload: resolve, onerror: reject }));
    document.head.append(script);
    await done;
    URL.revokeObjectURL(script.src);
    return window.niivue;
  };

  const round = (value) => (Number.isFinite(value) ? Number(value.toPrecision(3)).toString() : "–");

  const open = async (figure) => {
    const button = figure.querySelector("button");
    const panel = figure.querySelector(".panel");
    button.disabled = true;
    const { Niivue, NVImage } = await (library ??= load());
    button.hidden = true;
    panel.hidden = false;
    const [canvas, choice, strength, place] = ["canvas", "select", "input", "output"].map((name) =>
      panel.querySelector(name),
    );
    const layers = [...figure.querySelectorAll("script")].map((node) => ({ node, ...JSON.parse(node.dataset.layer) }));
    const view = new Niivue({
      backColor: [0, 0, 0, 1],
      crosshairWidth: 0.5,
      dragAndDropEnabled: false,
      fontMinPx: 18,
      isNearestInterpolation: true,
      isRadiologicalConvention: true,
      isResizeCanvas: true,
      loadingText: "",
      logLevel: "error",
      multiplanarForceRender: false,
      scrollRequiresFocus: true,
    });
    await view.attachToCanvas(canvas);
    view.onLocationChange = (location) => {
      const [x, y, z] = Array.from(location.mm, (value) => (Math.round(10 * value) / 10 || 0).toFixed(1));
      const shown = Number(choice.value);
      const values = [...new Set([0, shown])].map((number) => {
        const { name, unit, step, low } = layers[number];
        const value = location.values[number]?.value;
        // The lowest step stands for voxels that are not shown.
        const text = value === undefined || value < low - step / 2 ? "–" : `${round(value)}${unit && ` ${unit}`}`;
        return `${name} ${text}`;
      });
      place.textContent = `x ${x}, y ${y}, z ${z} mm: ${values.join(", ")}`;
    };
    for (const { node, name, colors, low, high, step } of layers) {
      const key = `jaxmed-${name}`;
      view.addColormap(key, colors);
      const image = await NVImage.loadFromBase64({
        base64: node.textContent.trim(),
        name: `${name}.nii.gz`,
        colormap: key,
        cal_min: low - step,
        cal_max: high,
        trustCalMinMax: true,
      });
      view.addVolume(image);
    }
    const show = () => {
      layers.forEach((_, number) => {
        const opacity = number === Number(choice.value) ? Number(strength.value) : 0;
        view.setOpacity(number, number === 0 ? 1 : opacity);
      });
      view.createOnLocationChange();
    };
    choice.addEventListener("change", show);
    strength.addEventListener("input", show);
    const moves = {
      ArrowLeft: [-1, 0, 0],
      ArrowRight: [1, 0, 0],
      ArrowDown: [0, -1, 0],
      ArrowUp: [0, 1, 0],
      PageDown: [0, 0, -1],
      PageUp: [0, 0, 1],
    };
    canvas.addEventListener("keydown", (event) => {
      if (event.key in moves) {
        event.preventDefault();
        view.moveCrosshairInVox(...moves[event.key]);
      }
    });
    view.setSliceType(view.sliceTypeMultiplanar);
    show();
    figure.dataset.state = "open";
  };

  for (const figure of document.querySelectorAll("figure.viewer")) {
    figure.hidden = false;
    figure.querySelector("button").addEventListener("click", () =>
      open(figure).catch((error) => {
        figure.querySelector("button").hidden = true;
        figure.querySelector(".panel").hidden = true;
        figure.querySelector(".failed").textContent =
          `This browser cannot show volumes (WebGL 2 and DecompressionStream are needed): ${error?.message ?? error}`;
        figure.dataset.state = "failed";
      }),
    );
  }
})();
