// The form's image: a chosen file, a photo, a pasted or dropped image, or the drawn sample.

const $ = (id) => document.getElementById(id);

/** The latest image as {name, uri, url}: `uri` is a data: URI to send, `url` a blob: URL to show. Null at first. */
export let image = null;

/** Call `onChange` when the image has changed, and `onError` with a message when a file is not an image. */
export function watchImageInputs(onChange, onError) {
  const take = (file) => setImage(file).then(onChange, (error) => onError(error.message));

  for (const input of [$("file"), $("camera")]) {
    input.addEventListener("change", () => {
      if (input.files.length) take(input.files[0]);
    });
    // Without this, choosing the same file again would cause no change event.
    input.addEventListener("click", () => (input.value = ""));
  }

  document.addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find((one) => one.type.startsWith("image/"));
    if (!file) return; // probably text for the labels
    event.preventDefault();
    take(file);
  });

  // A file can be dropped anywhere on the page. Each element under the pointer sends enter and leave events, so count them.
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

/** Use a file as the image, and show it. Throws an `Error` with a message if the file is not an image. */
export async function setImage(file) {
  if (file.type && !file.type.startsWith("image/")) {
    throw new Error(`${file.name} is not an image. Choose a JPEG, PNG, WebP, GIF, BMP or TIFF.`);
  }
  const uri = await readDataUri(file);
  if (image) URL.revokeObjectURL(image.url);
  image = { name: file.name || "image.png", uri, url: URL.createObjectURL(file) };
  showPreview(file.size);
}

function readDataUri(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} could not be read. Was it moved after you chose it?`));
    reader.readAsDataURL(file);
  });
}

function showPreview(bytes) {
  const { name, url } = image;
  const size = bytes < 1e6 ? `${Math.ceil(bytes / 1e3)}\u00a0kB` : `${(bytes / 1e6).toFixed(1)}\u00a0MB`;
  const preview = $("preview");
  $("drop").classList.add("full");
  $("no-image").hidden = true;
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

/** Draw the sample, a red circle on grey. The checkpoint that ships with Sightline knows such images. */
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
