//! A process makes a second one with fork(2), and both go on from there.
//!
//! The tutorial's section 一、fork 系统调用 (the fork system call), `demo1/fork.py`.
//! Run it with `cargo run -p fork`.

use std::error::Error;
use std::io::{self, Write};

use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, fork, getpid, getppid};

fn main() -> Result<(), Box<dyn Error>> {
    println!("Process ({}) start...", getpid());
    io::stdout().flush()?; // if std still buffers that line, the child would print it as well
    // SAFETY: this process has one thread, so its child may call any function.
    // Only works on Unix/Linux/Mac:
    match unsafe { fork() }? {
        ForkResult::Child => println!(
            "I am child process ({}) and my parent is {}.",
            getpid(),
            getppid()
        ),
        ForkResult::Parent { child } => {
            println!("I ({}) just created a child process ({child}).", getpid());
            waitpid(child, None)?; // otherwise the child may print a new parent's id
        }
    }
    Ok(())
}
