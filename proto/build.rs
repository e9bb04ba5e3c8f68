//! Compiles the .proto files with protox, so that no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=flash");
    let files = ["generate", "models", "admin"].map(|name| format!("flash/v1/{name}.proto"));
    tonic_prost_build::configure().compile_fds(protox::compile(files, ["."])?)?;
    Ok(())
}
