// Pictures and clips on their way into a question.

const LARGEST_FILE = 2 ** 21; // bytes; what has more, of these or of pixels, is encoded anew
const MOST_PIXELS = 2 ** 21; // some 2,700 tokens: several fit into what a request may bring
const LARGEST_CLIP = 20 * 2 ** 20; // bytes: as base64 within what the server takes
const KNOWN = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp", "image/tiff"]; // to the server

export const isClip = (uri) => uri.startsWith("data:video/");

/** A file's data: URI. Throws an Error with a message for people. */
export async function picture(file) {
  const name = file.name || "This";
  if (file.type.startsWith("video/")) {
    if (file.size > LARGEST_CLIP) throw new Error(`${name} is too large: a clip may have 20 MiB.`);
    return dataUri(file);
  }
  if (!file.type.startsWith("image/")) throw new Error(`${name} is neither a picture nor a clip.`);
  const light = KNOWN.includes(file.type) && file.size <= LARGEST_FILE;
  const bitmap = await createImageBitmap(file).catch(() => null);
  if (!bitmap && !light) throw new Error(`This browser cannot read ${file.name || "the picture"}.`);
  if (!bitmap || (light && bitmap.width * bitmap.height <= MOST_PIXELS)) return dataUri(file);
  return drawn(bitmap, bitmap.width, bitmap.height);
}

/** What a source (a bitmap, a video) shows, as a JPEG. */
export function drawn(source, width, height) {
  const scale = Math.min(1, Math.sqrt(MOST_PIXELS / (width * height)));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.floor(width * scale));
  canvas.height = Math.max(1, Math.floor(height * scale));
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff"; // what is transparent is white, as the server has it
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(source, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.92);
}

function dataUri(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}

/** Whether pages get a camera here: over http, from this machine's own server alone. */
export const hasCamera = () => Boolean(navigator.mediaDevices?.getUserMedia);

/** A picture of the camera, or null. Throws an Error with a message for people. */
export async function photograph(dialog) {
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch {
    throw new Error("There is no camera that this page may use.");
  }
  const video = dialog.querySelector("video");
  const shoot = dialog.querySelector("#shoot");
  shoot.disabled = true;
  video.onloadeddata = () => (shoot.disabled = false);
  video.srcObject = stream;
  dialog.showModal();
  try {
    return await new Promise((resolve) => {
      shoot.onclick = () => resolve(drawn(video, video.videoWidth, video.videoHeight));
      dialog.querySelector("#no-shot").onclick = () => resolve(null);
      dialog.oncancel = () => resolve(null);
    });
  } finally {
    stream.getTracks().forEach((track) => track.stop());
    video.srcObject = null;
    dialog.close();
  }
}
