// Draws the asset that the page holds: Gaussians by Spark, the mesh and the cameras by three.js.
//
// Everything is in glTF's axes: +Y is up, and the front of the object faces +Z. Text of users is only ever put
// into the page as text.

const asset = JSON.parse(document.getElementById("asset").textContent);
const find = (selector) => document.querySelector(selector);
const RED = 0xc33c31;
const BACKGROUNDS = { white: 0xffffff, grey: 0x808080, black: 0x000000 };
const FRUSTUM_DEPTH = 0.18; // of a camera that is drawn
const CALM_FRAMES = 4, FRAME_MS = 30, PATIENCE_MS = 60000;
const MAX_STD_DEV = 3.33; // where an opaque Gaussian has faded to 1/255
// What 3DGS adds to the variance of a splat, in square pixels. Spark's default is meant for fits with
// compensated opacity, which these are not.
const LOW_PASS_PX2 = 0.3;

function bytes(base64) {
  return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
}

async function loadLibraries() {
  const packed = new Blob([bytes(find("#libraries").textContent)]);
  const text = await new Response(packed.stream().pipeThrough(new DecompressionStream("gzip"))).text();
  const script = document.createElement("script");
  script.textContent = text;
  document.head.append(script);
  return globalThis.libraries;
}

// ---- The text ----

function element(name, text, parent, attributes = {}) {
  const made = Object.assign(document.createElement(name), { textContent: text }, attributes);
  parent.append(made);
  return made;
}

function showReport() {
  find("#title").textContent = asset.title;
  find("#verdict").textContent = asset.verdict;
  find("#verdict").hidden = !asset.verdict;
  if (["good", "suspect", "bad"].includes(asset.verdict)) find("#verdict").classList.add(asset.verdict);
  for (const [name, value] of asset.facts) {
    const row = element("tr", "", find("#facts table"));
    element("td", name, row);
    element("td", value, row);
  }
  for (const note of asset.notes) element("li", note, find("#facts ul"));
}

async function showRounds() {
  const { sheet, rows, labels } = asset.rounds;
  const picture = await decoded(sheet);
  const gap = 2, height = (picture.height - gap) / rows; // of a row of views.png, which has two for each round
  const [slider, output, canvas] = ["input", "output", "canvas"].map((name) => find(`#rounds ${name}`));
  Object.assign(canvas, { width: picture.width, height: 2 * height });
  Object.assign(slider, { max: labels.length - 1, value: labels.length - 1 });
  slider.oninput = () => {
    const top = picture.height - 2 * height * (labels.length - slider.value);
    canvas.getContext("2d").drawImage(picture, 0, -top);
    output.textContent = labels[slider.value];
  };
  slider.oninput();
  find("#rounds").hidden = false;
}

async function decoded(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  return image;
}

// ---- The stage ----

class Stage {
  constructor(libraries) {
    this.libraries = libraries;
    this.canvas = find("#stage canvas");
    this.renderer = new libraries.WebGLRenderer({ canvas: this.canvas, antialias: false, preserveDrawingBuffer: true });
    this.renderer.setPixelRatio(globalThis.devicePixelRatio);
    this.camera = new libraries.PerspectiveCamera(33.8, 1, 0.01, 100);
    this.camera.position.set(0.7, 0.7, 1.75);
    this.controls = new libraries.OrbitControls(this.camera, this.canvas);
    this.controls.addEventListener("start", () => this.#pressed(null));
    this.panels = [];
    this.background = new libraries.Color(BACKGROUNDS.white);
  }

  add(label, scene) {
    this.panels.push({ scene, label: element("p", label, find("#stage"), { className: "label" }) });
    this.panels.forEach((panel, index) => {
      panel.label.style.left = `calc(12px + ${(100 * index) / this.panels.length}%)`;
    });
  }

  // Each panel shows its scene from the same camera, beside the others.
  draw(width = this.canvas.clientWidth, height = this.canvas.clientHeight) {
    const { renderer, camera, panels } = this;
    const size = renderer.getSize(new this.libraries.Vector3());
    if (size.x !== width || size.y !== height) renderer.setSize(width, height, false);
    const share = width / panels.length;
    camera.aspect = share / height;
    camera.updateProjectionMatrix();
    renderer.setScissorTest(true);
    panels.forEach(({ scene }, index) => {
      scene.background = this.background;
      renderer.setViewport(index * share, 0, share, height);
      renderer.setScissor(index * share, 0, share, height);
      renderer.render(scene, camera);
    });
  }

  run() {
    this.renderer.setAnimationLoop(() => {
      this.controls.update();
      this.draw();
    });
  }

  // Puts the camera where a view was taken.
  look({ c2w, fovDeg }) {
    const { camera, controls } = this;
    const pose = new this.libraries.Matrix4().set(...c2w);
    camera.fov = fovDeg;
    camera.position.setFromMatrixPosition(pose);
    const ahead = new this.libraries.Vector3(0, 0, -1).transformDirection(pose);
    controls.target.copy(camera.position).addScaledVector(ahead, camera.position.length());
    controls.update();
  }

  select(index) {
    this.controls.autoRotate = false;
    this.look(asset.views[index]);
    this.#pressed(index);
  }

  #pressed(index) {
    document.querySelectorAll("#views button").forEach((each, k) => each.setAttribute("aria-pressed", k === index));
  }

  // Draws until Spark has sorted the Gaussians, which a worker does some frames behind the camera.
  async #sorted(sizePx) {
    const spark = this.panels[0].scene.children.find((each) => each instanceof this.libraries.SparkRenderer);
    const end = performance.now() + PATIENCE_MS;
    for (let calm = 0; calm < CALM_FRAMES; calm++) {
      this.draw(sizePx, sizePx);
      await new Promise((done) => setTimeout(done, FRAME_MS));
      if (spark.sorting || spark.sortDirty || !spark.activeSplats) calm = -1;
      if (performance.now() > end) throw new Error("the Gaussians are not sorted in time");
    }
    this.draw(sizePx, sizePx);
  }

  // The Gaussians alone as a view shows them, or the scene of another panel, as a data URL; for those who compare pixels.
  async picture(view, sizePx, panel = 0) {
    const { panels, renderer } = this;
    renderer.setAnimationLoop(null);
    renderer.setPixelRatio(1);
    this.panels = panels.slice(panel, panel + 1);
    const drawn = this.panels[0].scene.children.filter((each) => each.isLineSegments && each.visible);
    drawn.forEach((each) => (each.visible = false));
    this.look(view);
    if (panel === 0) await this.#sorted(sizePx);
    else this.draw(sizePx, sizePx);
    const url = this.canvas.toDataURL("image/png");
    drawn.forEach((each) => (each.visible = true));
    this.panels = panels;
    renderer.setPixelRatio(globalThis.devicePixelRatio);
    this.run();
    return url;
  }
}

async function splatScene(stage) {
  const { Scene, SparkRenderer, SplatMesh } = stage.libraries;
  const scene = new Scene();
  const splats = new SplatMesh({ fileBytes: bytes(asset.ply), fileType: "ply" });
  await splats.initialized;
  const spark = new SparkRenderer({
    renderer: stage.renderer, preBlurAmount: LOW_PASS_PX2, blurAmount: 0, sortRadial: false, maxStdDev: MAX_STD_DEV,
  });
  scene.add(spark, splats);
  return scene;
}

async function meshScene(stage) {
  const { Scene, GLTFLoader, AmbientLight } = stage.libraries;
  const scene = new Scene();
  const { scene: mesh } = await new GLTFLoader().parseAsync(bytes(asset.mesh.glb).buffer, "");
  mesh.scale.setScalar(asset.mesh.scale); // the file has the scale and the place of the asset's own world
  mesh.position.set(...asset.mesh.offset);
  scene.add(mesh, new AmbientLight(0xffffff, Math.PI)); // the texture as it is
  return scene;
}

// The cameras of the views: pyramids from where a camera is to what it sees.
function cameraLines({ LineSegments, BufferGeometry, Float32BufferAttribute, LineBasicMaterial, Matrix4, Vector3 }) {
  const points = [];
  for (const { c2w, fovDeg, aspect } of asset.views) {
    const pose = new Matrix4().set(...c2w);
    const top = FRUSTUM_DEPTH * Math.tan((fovDeg * Math.PI) / 360), side = top * aspect;
    const corners = [[-side, -top], [side, -top], [side, top], [-side, top]];
    const [eye, ...rim] = [[0, 0, 0], ...corners.map((each) => [...each, -FRUSTUM_DEPTH])]
      .map((each) => new Vector3(...each).applyMatrix4(pose).toArray());
    rim.forEach((corner, index) => points.push(...eye, ...corner, ...corner, ...rim[(index + 1) % 4]));
  }
  const lines = new BufferGeometry();
  lines.setAttribute("position", new Float32BufferAttribute(points, 3));
  return new LineSegments(lines, new LineBasicMaterial({ color: RED }));
}

// ---- What can be pressed ----

function checkbox(text, checked, changed) {
  const label = element("label", "", find("#controls"));
  const box = element("input", "", label, { type: "checkbox", checked });
  label.append(` ${text}`);
  box.onchange = () => changed(box.checked);
  changed(checked);
}

function addControls(stage, cameras) {
  checkbox("turn", false, (on) => (stage.controls.autoRotate = on));
  if (asset.views.length) checkbox("cameras", true, (on) => cameras.forEach((each) => (each.visible = on)));
  const label = element("label", "background ", find("#controls"));
  const choice = element("select", "", label);
  for (const name of Object.keys(BACKGROUNDS)) element("option", name, choice, { value: name });
  choice.onchange = () => stage.background.set(BACKGROUNDS[choice.value]);
  asset.views.forEach(({ picture }, index) => {
    const button = element("button", "", find("#views"), { title: `view ${index}`, onclick: () => stage.select(index) });
    element("img", "", button, { src: picture, alt: `view ${index}` });
  });
}

async function main() {
  showReport();
  if (asset.rounds) await showRounds();
  const stage = new Stage(await loadLibraries());
  if (asset.ply) stage.add(`${asset.numGaussians} Gaussians`, await splatScene(stage));
  if (asset.mesh) stage.add("mesh", await meshScene(stage));
  const cameras = asset.views.length ? stage.panels.map(() => cameraLines(stage.libraries)) : [];
  cameras.forEach((each, index) => stage.panels[index].scene.add(each));
  addControls(stage, cameras);
  stage.run();
  find("#state").textContent = "";
  return stage;
}

// Whoever drives the page from outside awaits this.
globalThis.im3d = main().catch((error) => {
  find("#state").textContent = `This browser cannot draw the asset: ${error.message}`;
  throw error;
});
