//! Where flashd looks for MLX's library when it is installed: in `lib/flashd` beside its `bin`, where `engine/mlx/install` puts it.
//! The checkout that it was built in, which the set-up's own linker flags name, comes before that while it is there.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_MLX").is_some() {
        let own = if std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "macos") { "@executable_path" } else { "$ORIGIN" };
        println!("cargo::rustc-link-arg-bins=-Wl,-rpath,{own}/../lib/flashd/mlx/lib");
    }
}
