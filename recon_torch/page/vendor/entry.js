// What the page uses of three.js and Spark.
export {
  AmbientLight, Box3, BufferGeometry, Color, Float32BufferAttribute, LineBasicMaterial, LineSegments, Matrix4,
  PerspectiveCamera, Scene, SRGBColorSpace, Vector3, WebGLRenderer,
} from "three";
export { OrbitControls } from "three/addons/controls/OrbitControls.js";
export { GLTFLoader } from "three/addons/loaders/GLTFLoader.js";
export { SparkRenderer, SplatMesh } from "@sparkjsdev/spark";
