// The image that is asked about: chosen, photographed, pasted, dropped or drawn.

const $ = (id) => document.getElementById(id);

/** What was given last, as {name, uri, url}: a data: URI to send and a blob: URL to show. Null at first. */
export let picture = null;

/** Call `onChange` when there is another image, and `onError` with words when a file is none. */
export function watchPicture(onChange, onError) {
  const take = (file) => takePicture(file).then(onChange, (error) => onError(error.message));

  for (const input of [$("file"), $("camera")]) {
    input.addEventListener("change", () => {
      if (input.files.length) take(input.files[0]);
    });
    // The same file chosen again is a new choice.
    input.addEventListener("click", () => (input.value = ""));
  }

  document.addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find((one) => one.type.startsWith("image/"));
    if (!file) return; // text for the labels, most likely
    event.preventDefault();
    take(file);
  });

  // Anywhere on the page will do. Each element on the way sends its own enter and leave, hence the count.
  let entered = 0;
  for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      if (kind === "dragenter") entered += 1;
      if (kind === "dragleave") entered -= 1;
      if (kind === "drop") entered = 0;
      $("drop").classList.toggle("over", entered > 0);
      if (kind === "drop" && event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
    });
  }
}

/** Make a file the image and show it. Throws an `Error` with words when it cannot be one. */
export async function takePicture(file) {
  if (file.type && !file.type.startsWith("image/")) {
    throw new Error(`${file.name} is not an image. Choose a JPEG, PNG, WebP, GIF, BMP or TIFF.`);
  }
  const uri = await readDataUri(file);
  if (picture) URL.revokeObjectURL(picture.url);
  picture = { name: file.name || "image.png", uri, url: URL.createObjectURL(file) };
  showPicture(file.size);
}

function readDataUri(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} could not be read. Was it moved since it was chosen?`));
    reader.readAsDataURL(file);
  });
}

function showPicture(bytes) {
  const { name, url } = picture;
  const size = bytes < 1e6 ? `${Math.ceil(bytes / 1e3)}\u00a0kB` : `${(bytes / 1e6).toFixed(1)}\u00a0MB`;
  const preview = $("preview");
  $("drop").classList.add("full");
  $("no-picture").hidden = true;
  $("no-preview").hidden = true;
  $("about-image").textContent = `${name}, ${size}`;
  preview.onload = () => {
    const sides = `${preview.naturalWidth}\u00a0×\u00a0${preview.naturalHeight}`;
    $("about-image").textContent = `${name}, ${sides}, ${size}`;
  };
  preview.onerror = () => {
    preview.hidden = true;
    $("no-preview").hidden = false;
  };
  preview.hidden = false;
  preview.alt = `Preview of ${name}`;
  preview.src = url;
}

/** A red circle on grey: something to try with, of the kind that the checkpoint that ships with Sightline knows. */
export function drawSample() {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 256;
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#c8c8c8";
  pen.fillRect(0, 0, 256, 256);
  pen.fillStyle = "#dc1e1e";
  pen.beginPath();
  pen.arc(128, 128, 80, 0, 2 * Math.PI);
  pen.fill();
  return new Promise((resolve) => {
    canvas.toBlob((blob) => resolve(new File([blob], "red-circle.png", { type: "image/png" })), "image/png");
  });
}
